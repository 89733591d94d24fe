"""Package generators as a Bento: bundles, this package's wheel and pinned requirements in one folder."""
