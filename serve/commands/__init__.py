"""The sub-commands of this stage: serve, loadtest and package."""
