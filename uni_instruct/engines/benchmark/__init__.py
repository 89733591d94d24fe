"""Speeds of engines, compared within one run."""
