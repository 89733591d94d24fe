"""What is minimised: the divergences' terms, and the ratio, reward, pairs and guidance that they need."""
