"""What several test modules make their cases of; one module a thing."""
