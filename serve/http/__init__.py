"""What is common to all HTTP requests: keys, limits of size, headers, connections, the access log."""
