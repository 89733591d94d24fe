"""The two stages of a run, teacher and distillation, step by step."""
