"""The engines, one file per runtime, and what they share."""

import os

# On import, ONNX Runtime (1.32) writes a device id and a telemetry database into the user's cache. This must come before that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
