"""The networks, with the parameter names and numerics of their publications: EDM, EDM2, diffusers' AutoencoderKL, DINOv2."""
