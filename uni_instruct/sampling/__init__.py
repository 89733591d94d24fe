"""Generate many images to disk, resumably and with several processes.

shards: the parts of a request and their locks. run: a request in progress. forms: output as folder, npz, zip or tars.
"""

from uni_instruct.sampling.forms import Samples, read_samples
from uni_instruct.sampling.run import SampleRequest, SampleRun, is_finished, noted_engine, open_run, remove_leftovers

__all__ = [
    "SampleRequest",
    "SampleRun",
    "Samples",
    "is_finished",
    "noted_engine",
    "open_run",
    "read_samples",
    "remove_leftovers",
]
