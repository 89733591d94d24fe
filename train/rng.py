"""Random numbers that depend on seed, stage and step alone, so that a resumed run is the run that was not interrupted."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch

Built = TypeVar("Built")


def step_rng(seed: int, stage: str, step: int) -> torch.Generator:
    """A CPU generator for one training step. Drawing on the CPU gives the same run on every device."""
    # A hash, as generators of neighbouring seeds may be alike in what they draw first.
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_weights(build: Callable[[], Built], seed: int) -> Built:
    """What `build` makes, with weights that depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
