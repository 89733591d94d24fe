"""One file per runtime; each holds one `Engine`."""
