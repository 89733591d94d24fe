"""A Bento: bundles, this package and exact requirements in one folder."""
