"""The web demo under /ui."""
