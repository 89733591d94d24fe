"""The request and the answer of each API route."""
