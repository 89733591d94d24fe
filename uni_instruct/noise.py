"""Seeds to noise and classes. One seed is one image, whatever the engine, batch, order or machine. NumPy only."""

from collections.abc import Sequence

import numpy as np

from uni_instruct.errors import RequestError
from uni_instruct.spec import ImageShape

SEED_LIMIT = 2**63
MAX_SEEDS = 10_000_000
MAX_DIGITS = 40  # Python refuses to read numbers of thousands of digits
_NOISE_STREAM, _CLASS_STREAM = 0, 1


def noise(seeds: Sequence[int], shape: ImageShape) -> np.ndarray:
    """One N(0, 1) draw per seed: float32 [len(seeds), *shape]. Image i depends on seeds[i] alone, never on its batch."""
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in zip(out, seeds, strict=True):
        _generator(seed, _NOISE_STREAM).standard_normal(dtype=np.float32, out=row)
    return out


def random_class_ids(seeds: Sequence[int], num_classes: int) -> np.ndarray:
    """A class for each seed, uniform on 0..num_classes-1 and independent of the seed's noise: int64 [len(seeds)]."""
    return np.array([_generator(seed, _CLASS_STREAM).integers(num_classes) for seed in seeds], dtype=np.int64)


def parse_seeds(text: str) -> list[int]:
    """Seeds from '7', '0-63' or '1,5,10-12' (both ends included). Raises RequestError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (number.strip() for number in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or max(len(first), len(last)) > MAX_DIGITS:
            raise RequestError(
                f"seeds '{text[:60]}' cannot be read", remedy="write them as 7, 0-63 or 1,5,10-12", param="seeds"
            )
        start, stop = int(first), int(last if dash else first)
        check_seeds([start, stop])
        if stop < start:
            raise RequestError(f"seed range {part} is empty", remedy="put the smaller seed first", param="seeds")
        if len(seeds) + stop - start >= MAX_SEEDS:
            raise RequestError(f"seeds '{text[:60]}' are more than {MAX_SEEDS}", remedy="ask for fewer at once", param="seeds")
        seeds.extend(range(start, stop + 1))
    return seeds


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises RequestError unless every seed is an integer in [0, 2**63)."""
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < SEED_LIMIT:
            raise RequestError(
                f"seed {seed!r} is not an integer in [0, 2**63)",
                remedy="choose seeds from 0 to 9223372036854775807",
                param="seeds",
            )


def _generator(seed: int, stream: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))
