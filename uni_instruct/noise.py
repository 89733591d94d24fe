"""What goes into a generator: noise and classes of seeds, checked alike for every engine. NumPy only.

One seed is one image, whatever the engine, batch, order or machine.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.errors import RequestError
from uni_instruct.spec import ImageShape, ModelSpec

SEED_LIMIT = 2**63
MAX_SEEDS = 10_000_000
MAX_DIGITS = 40  # Python refuses to read numbers of thousands of digits
_NOISE_STREAM, _CLASS_STREAM = 0, 1
# Sine of the angle below which two noises count as parallel: a straight line is then as good as an arc.
_PARALLEL = 1e-6


class Inputs(NamedTuple):
    """What an engine is called with: noise float32 [B, *noise_shape]; class_ids int64 [B] or mixtures, None without classes."""

    noise: np.ndarray
    class_ids: ClassIds | None

    def parts(self, size: int | None) -> Iterator["Inputs"]:
        """The same in parts of at most `size` rows; whole where there is no size."""
        size = size or max(1, len(self.noise))
        for start in range(0, len(self.noise), size):
            part = slice(start, start + size)
            yield Inputs(self.noise[part], None if self.class_ids is None else self.class_ids[part])

    def padded(self, size: int) -> "Inputs":
        """The same in `size` rows: the last one is repeated."""
        rows = np.minimum(np.arange(size), len(self.noise) - 1)
        return Inputs(self.noise[rows], None if self.class_ids is None else self.class_ids[rows])


class Between(NamedTuple):
    """A place on the way from one seed's noise to another's: position 0 is the first, 1 the second."""

    start: int
    end: int
    position: float


# What noise can be drawn of: a seed, or a place between two.
NoisePoint = int | Between


def draw_inputs(spec: ModelSpec, points: Sequence[NoisePoint], class_ids: ClassIds | None) -> Inputs:
    """The inputs of seeds, or of places between seeds, and their classes.

    Both are known to be good: `generate.input_batches` and `walk_points` check first.
    """
    return Inputs(noise_of_points(points, spec.noise_shape), class_ids)


def noise(seeds: Sequence[int], shape: ImageShape) -> np.ndarray:
    """One N(0, 1) draw per seed: float32 [len(seeds), *shape]. Image i depends on seeds[i] alone, never on its batch."""
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in zip(out, seeds, strict=True):
        _generator(seed, _NOISE_STREAM).standard_normal(dtype=np.float32, out=row)
    return out


def noise_of_points(points: Sequence[NoisePoint], shape: ImageShape) -> np.ndarray:
    """The noise of each point: float32 [len(points), *shape]. A seed's is `noise`'s, bit for bit, also at the end of a way."""
    out = np.empty((len(points), *shape), dtype=np.float32)
    for row, point in zip(out, points, strict=True):
        if isinstance(point, Between):
            start, end = noise([point.start, point.end], shape)
            row[...] = slerp(start, end, point.position)
        else:
            _generator(point, _NOISE_STREAM).standard_normal(dtype=np.float32, out=row)
    return out


def slerp(start: np.ndarray, end: np.ndarray, position: float) -> np.ndarray:
    """Spherical interpolation from one noise to another, both float32 of one shape; position in [0, 1]: float32, same shape.

    The direction turns at constant speed (Shoemake 1985) and the norm changes linearly, so that every place has the norm of
    noise: z(t) = ((1 - t) |a| + t |b|) (sin((1 - t) w) a/|a| + sin(t w) b/|b|) / sin w, w the angle between a and b. A straight
    line would pass nearer to 0, where a generator has never been. Both ends are exact. Opposite directions have no way
    between them that is nearer than the others: the noise then stays on the straight line.
    """
    if position <= 0.0 or position >= 1.0:
        return (start if position <= 0.0 else end).copy()
    # In double precision: sin w is a small difference of large numbers where the two are nearly parallel.
    a, b = start.astype(np.float64), end.astype(np.float64)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    cosine = np.vdot(a, b) / (norms[0] * norms[1]) if all(norms) else 1.0
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    if np.sin(angle) < _PARALLEL:
        return ((1.0 - position) * a + position * b).astype(np.float32)
    direction = np.sin((1.0 - position) * angle) * a / norms[0] + np.sin(position * angle) * b / norms[1]
    norm = (1.0 - position) * norms[0] + position * norms[1]
    return (norm / np.sin(angle) * direction).astype(np.float32)


def walk_points(seeds: Sequence[int], positions: Sequence[float]) -> list[NoisePoint]:
    """Places on the way through the seeds, one for each position: 0 is the first seed, 1.5 half-way from second to third.

    Whole positions are the seeds themselves. Raises RequestError for fewer than one seed, and a position outside the walk.
    """
    seeds, last = checked_seeds(seeds), len(seeds) - 1
    if last < 0:
        raise RequestError("the walk has no seeds", remedy="give at least one, such as [7, 8]", param="seeds")
    points: list[NoisePoint] = []
    for position in positions:
        if not 0.0 <= position <= last:  # not true of nan either
            raise RequestError(
                f"position {position:g} is not on the walk", remedy=f"choose positions from 0 to {last}", param="positions"
            )
        index, rest = int(position), position - int(position)
        points.append(Between(seeds[index], seeds[index + 1], rest) if rest else seeds[index])
    return points


def random_class_ids(seeds: Sequence[int], num_classes: int, shares: np.ndarray | None = None) -> np.ndarray:
    """A class for each seed, on 0..num_classes-1 and independent of the seed's noise: int64 [len(seeds)].

    Uniform, or as often as `shares` [num_classes] says, which need not sum to 1.
    """
    if shares is None:
        return np.array([_generator(seed, _CLASS_STREAM).integers(num_classes) for seed in seeds], dtype=np.int64)
    # u uniform on [0, 1): class k where (s_0 + .. + s_(k-1)) / s <= u < (s_0 + .. + s_k) / s.
    ends = np.cumsum(shares, dtype=np.float64)
    drawn = np.array([_generator(seed, _CLASS_STREAM).random() for seed in seeds])
    return np.searchsorted(ends / ends[-1], drawn, side="right").astype(np.int64)


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
        checked_seeds([start, stop])
        if stop < start:
            raise RequestError(f"seed range {part} is empty", remedy="put the smaller seed first", param="seeds")
        if len(seeds) + stop - start >= MAX_SEEDS:
            raise RequestError(f"seeds '{text[:60]}' are more than {MAX_SEEDS}", remedy="ask for fewer at once", param="seeds")
        seeds.extend(range(start, stop + 1))
    return seeds


def checked_seeds(seeds: Sequence[int] | np.ndarray) -> Sequence[int]:
    """The seeds as a sequence. Raises RequestError unless it is one, of integers in [0, 2**63)."""
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Sequence):
        raise RequestError(
            f"seeds {str(seeds)[:60]!r} are no list", remedy="give integers, such as [7, 8] or range(64)", param="seeds"
        )
    # What lies between the ends of a range need not be looked at: it may be millions.
    for seed in (seeds[0], seeds[-1]) if isinstance(seeds, range) and seeds else seeds:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < SEED_LIMIT:
            raise RequestError(
                f"seed {seed!r} is not an integer in [0, 2**63)",
                remedy="choose seeds from 0 to 9223372036854775807",
                param="seeds",
            )
    return seeds


def checked_class_ids(spec: ModelSpec, class_ids: ArrayLike | ClassMixture | None, count: int) -> ClassIds | None:
    """The ids as int64 [count], or the mixtures of so many; None exactly for an unconditional generator.

    Raises RequestError for anything else.
    """
    if class_ids is None and spec.num_classes:
        raise RequestError(
            f"generator '{spec.name}' has {spec.num_classes} classes, and no class ids were given",
            remedy="give one for each image; generate_images draws them from the seeds",
            param="class_ids",
        )
    if class_ids is None:
        return None
    if not spec.num_classes:
        raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave the class out", param="classes")
    if isinstance(class_ids, ClassMixture):
        first, second = (checked_ids(spec, part, count) for part in (class_ids.class_ids, class_ids.other_ids))
        return ClassMixture(first, second, checked_share(class_ids.share, count))
    return checked_ids(spec, class_ids, count)


def checked_ids(spec: ModelSpec, class_ids: ArrayLike, count: int) -> np.ndarray:
    """The ids of a generator with classes as int64 [count]. Raises RequestError for anything else."""
    ids = _array(class_ids, "class ids")
    if ids.dtype.kind not in "iu" or ids.shape != (count,):
        raise RequestError(
            f"class ids are {ids.dtype} {list(ids.shape)}, not integers [{count}]",
            remedy="give an id for each image",
            param="class_ids",
        )
    outside = (ids < 0) | (ids >= spec.num_classes)
    if outside.any():
        spec.class_id(int(ids[outside][0]))  # raises
    return _own(ids.astype(np.int64, copy=False))


def checked_share(share: ArrayLike, count: int | None = None) -> np.ndarray:
    """Shares of mixtures as float32 [count], or as many as there are.

    Raises RequestError unless they are numbers in [0, 1], one for each image.
    """
    shares = _array(share, "share")
    if count is None:
        shares = np.atleast_1d(shares)
        count = len(shares)
    if shares.dtype.kind not in "fiu" or shares.shape != (count,):
        raise RequestError(
            f"shares are {shares.dtype} {list(shares.shape)}, not numbers [{count}]",
            remedy="give one for each image, from 0 to 1",
            param="share",
        )
    inside = (shares >= 0) & (shares <= 1)  # not true of nan either
    if not inside.all():
        raise RequestError(
            f"share {shares[~inside][0]:g} is outside 0..1",
            remedy="0 is the one class, 1 the other, 0.5 half of each",
            param="share",
        )
    return _own(shares.astype(np.float32, copy=False))


def checked_inputs(spec: ModelSpec, noise: ArrayLike, class_ids: ArrayLike | ClassMixture | None) -> Inputs:
    """What every engine's call begins with. Raises RequestError unless these are the inputs of B >= 1 images of the spec.

    Class ids may be any integers, in a list or an array, or mixtures of two. Noise must be float32: a cast could hide that it
    is something else.
    """
    z = _array(noise, "noise")
    if z.dtype != np.float32:
        raise RequestError(f"noise is {z.dtype}, not float32", remedy="give noise.astype('float32')", param="noise")
    if z.ndim != 4 or z.shape[1:] != tuple(spec.noise_shape) or not len(z):
        raise RequestError(
            f"noise is {list(z.shape)}, not [B, {', '.join(map(str, spec.noise_shape))}] of B >= 1 images",
            remedy="make it with uni_instruct.noise.noise(seeds, spec.noise_shape)",
            param="noise",
        )
    return Inputs(_own(z), checked_class_ids(spec, class_ids, len(z)))


def round_robin_class_ids(spec: ModelSpec, count: int) -> np.ndarray | None:
    """0, 1, ... and round again, so that `count` images see every class where they can: int64 [count], None without classes."""
    return np.arange(count, dtype=np.int64) % spec.num_classes if spec.num_classes else None


def _array(values: ArrayLike, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; a torch tensor on a GPU, or with a gradient
        reason = " ".join(str(error).split())[:100]
        raise RequestError(f"{name} cannot be read as an array: {reason}", remedy="give a NumPy array", param=name) from error


def _own(array: np.ndarray) -> np.ndarray:
    """As runtimes want it, who share its memory: torch warns of what it must not write to, and refuses negative strides."""
    return array if array.flags.carray else array.copy()


class _Philox(threading.local):
    """One generator a thread, set to a key and to the beginning of its stream: a new one takes twenty times as long."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._beginning = self._bits.state
        self._key: np.ndarray = self._beginning["state"]["key"]

    def at(self, seed: int, stream: int) -> np.random.Generator:
        self._key[:] = seed, stream
        self._bits.state = self._beginning
        return self._generator


_philox = _Philox()


def _generator(seed: int, stream: int) -> np.random.Generator:
    """The counter-based generator of (seed, stream), at its beginning; the thread's next call sets it to another."""
    return _philox.at(seed, stream)
