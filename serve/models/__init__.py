"""The generators in memory, by name."""
