"""The networks: parameter names and numerics as in EDM (Karras et al. 2022, arXiv 2206.00364)."""
