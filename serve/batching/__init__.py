"""Requests in, batches to the engine, images back."""
