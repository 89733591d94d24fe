"""Read other projects' checkpoints without running anything in them, as NumPy arrays and plain values. Needs no torch."""
