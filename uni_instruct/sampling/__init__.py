"""Many images on disk: shards (who has done which), run (a request on its way), forms (folder, npz, zip)."""

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
