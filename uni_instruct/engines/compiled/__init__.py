"""Engines whose code torch's inductor compiles on this machine."""
