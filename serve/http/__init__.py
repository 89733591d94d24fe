"""What all HTTP requests have in common: API key, size limit, headers, connections, access log."""
