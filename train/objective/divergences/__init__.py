"""f-divergences: the built-in table, a user's own f, and the lookup by name in both."""
