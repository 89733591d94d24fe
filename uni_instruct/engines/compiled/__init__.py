"""Engines that are compiled on this machine."""
