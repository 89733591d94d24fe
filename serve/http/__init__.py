"""HTTP itself, whatever is asked for: keys, sizes, headers, connections."""
