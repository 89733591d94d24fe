"""Benchmarks that compare engines within one run."""
