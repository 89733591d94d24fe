"""Training: from a recipe to a teacher (a diffusion model), and from the teacher to a one-step generator."""
