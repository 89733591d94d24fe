"""f-divergences: the table, the user's own f, and how a name is looked up in both."""
