"""Devices, processors and threads of this machine."""
