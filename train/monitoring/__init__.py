"""What is said about a run: metrics, sickness in words, faults, trackers."""
