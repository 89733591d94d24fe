"""Dynamic batching: requests come in, batches go to the engine, and images go back to the requests."""
