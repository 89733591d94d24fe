"""Several methods from one teacher, side by side: the same seeds, the same number of images, one page of results."""
