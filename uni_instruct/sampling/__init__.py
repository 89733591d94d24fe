"""Generate many images to disk, resumably and with several processes.

shards: the parts of a request and their locks. run: a request in progress. forms: output as folder, npz, zip or tars.
"""

from uni_instruct.sampling.forms import Samples, read_samples
from uni_instruct.sampling.run import SampleRequest, SampleRun, is_finished, open_run, recorded_engine, remove_leftovers

__all__ = [
    "SampleRequest",
    "SampleRun",
    "Samples",
    "is_finished",
    "open_run",
    "read_samples",
    "recorded_engine",
    "remove_leftovers",
]
