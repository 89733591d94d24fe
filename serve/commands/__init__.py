"""The sub-commands of this stage."""
