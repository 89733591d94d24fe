"""The core's sub-commands, one file each. A stage keeps its own in its `commands/`."""
