"""Monitoring of a run: metrics, warnings, divergence errors, trackers, the log read back, and `train --status`."""
