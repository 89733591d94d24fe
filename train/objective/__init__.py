"""What training minimises: the terms of a divergence, and the density ratio, reward, pairs and guidance that they need."""
