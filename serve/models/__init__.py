"""The generators that a worker has loaded, by name."""
