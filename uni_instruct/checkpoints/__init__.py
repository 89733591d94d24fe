"""Other projects' checkpoints, read without running anything in them: NumPy arrays and plain values, no torch."""
