"""Random numbers that depend on seed, stage and step alone, so that a resumed run equals an uninterrupted one."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch

Built = TypeVar("Built")


def step_rng(seed: int, stage: str, step: int) -> torch.Generator:
    """A CPU generator for one training step. Numbers drawn on the CPU are the same whatever the training device."""
    # Seeded by a hash, because generators with neighbouring seeds may start with similar numbers.
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_weights(build: Callable[[], Built], seed: int) -> Built:
    """The result of build(), with weights that depend on the seed alone. The global CPU generator's state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
