"""The first batch of a process may run in several streams at once."""

import subprocess
import sys

import pytest

_SCRIPT = """
import threading, time
import numpy as np, openvino, openvino.opset13 as ops
from numpy.lib import NumpyVersion
from uni_instruct.engines.openvino import _import_numpy_first

prompt = NumpyVersion.__init__

def slow(self, text):  # what the look-up calls: another thread comes meanwhile
    time.sleep(0.3)
    prompt(self, text)

NumpyVersion.__init__ = slow
x = ops.parameter([-1, 4], openvino.Type.f32)
compiled = openvino.Core().compile_model(openvino.Model([ops.relu(x)], [x], "m"), "CPU", {"NUM_STREAMS": 2})
requests = [compiled.create_infer_request() for _ in range(2)]
_import_numpy_first()
sums = []

def run(request):
    sums.append(request.infer([np.ones((2, 4), np.float32)])[0].sum())

threads = [threading.Thread(target=run, args=(request,), daemon=True) for request in requests]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*sums)
"""


def test_streams_do_not_wait_for_each_other_for_ever() -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-P", "-c", _SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["8.0", "8.0"]
