"""Trials: each engine is run once on this machine and compared with torch before it is used."""
