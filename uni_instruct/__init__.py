"""One-step image generators: train, export, serve, sample and evaluate.

The core (this package without its stages `train`, `export` and `serve`) says what a one-step generator is and how one is run.
"""

__version__ = "0.1.0"
