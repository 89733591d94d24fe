"""Engines tried on this machine before they are trusted."""
