"""The two stages of a run, teacher and distillation, and what one training step of each does."""
