"""One file per runtime; each holds one `Engine`."""

import os

# ONNX Runtime (1.32) keeps a device id and a database of events in the user's cache, from the moment it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
