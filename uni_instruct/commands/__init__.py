"""The core's sub-commands, one file each. The stages (train, export, serve) have `commands/` folders of their own."""
