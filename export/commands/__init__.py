"""The sub-commands `export`, `publish` and `card`."""
