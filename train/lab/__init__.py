"""Comparison of several methods from one teacher, with the same seeds and number of images, on one page of results."""
