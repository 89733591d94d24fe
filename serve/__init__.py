"""The HTTP service and its web demo."""
