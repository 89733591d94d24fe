"""A generator's inputs: the noise and classes of seeds, and the checks that all engines share. NumPy only.

A seed makes the same image with any engine, batch, order or machine, up to rounding.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.errors import RequestError
from uni_instruct.spec import ImageShape, ModelSpec

SEED_LIMIT = 2**63  # seeds fit into int64
MAX_SEEDS = 10_000_000  # of one text of seeds, whose list must fit into memory
MAX_DIGITS = 40  # of one number in a list of seeds; `int` raises ValueError for thousands of digits
# Noise and class of a seed are drawn from separate streams, so that they are independent.
_NOISE_STREAM, _CLASS_STREAM = 0, 1
# Sine of the angle below which two noises count as parallel: a straight line is then as good as an arc.
_PARALLEL = 1e-6


class Inputs(NamedTuple):
    """An engine's inputs: noise float32 [B, *noise_shape]; class_ids int64 [B] or mixtures, None for an unconditional model."""

    noise: np.ndarray
    class_ids: ClassIds | None

    def parts(self, size: int | None) -> Iterator["Inputs"]:
        """The inputs in parts of at most `size` rows; in one part if size is None."""
        size = size or max(1, len(self.noise))
        for start in range(0, len(self.noise), size):
            part = slice(start, start + size)
            yield Inputs(self.noise[part], None if self.class_ids is None else self.class_ids[part])

    def padded(self, size: int) -> "Inputs":
        """The inputs extended to `size` rows by repeating the last row."""
        rows = np.minimum(np.arange(size), len(self.noise) - 1)
        return Inputs(self.noise[rows], None if self.class_ids is None else self.class_ids[rows])


class Between(NamedTuple):
    """A point on the path from one seed's noise to another's: position 0 is the start's noise, 1 the end's."""

    start: int
    end: int
    position: float


# A point that noise can be drawn for: a seed, or a point between two seeds.
NoisePoint = int | Between


def draw_inputs(spec: ModelSpec, points: Sequence[NoisePoint], class_ids: ClassIds | None) -> Inputs:
    """The inputs for seeds, or points between seeds, and their classes.

    Nothing is checked here: `generate.input_batches` and `walk_points` have done it.
    """
    return Inputs(noise_at_points(points, spec.noise_shape), class_ids)


def noise(seeds: Sequence[int], shape: ImageShape) -> np.ndarray:
    """One N(0, 1) draw per seed: float32 [len(seeds), *shape]. Image i depends on seeds[i] alone, never on its batch."""
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in zip(out, seeds, strict=True):
        _generator(seed, _NOISE_STREAM).standard_normal(dtype=np.float32, out=row)
    return out


def noise_at_points(points: Sequence[NoisePoint], shape: ImageShape) -> np.ndarray:
    """The noise of each point: float32 [len(points), *shape]. For seeds, and at positions 0 and 1, it equals `noise`."""
    out = np.empty((len(points), *shape), dtype=np.float32)
    for row, point in zip(out, points, strict=True):
        if isinstance(point, Between):
            start, end = noise([point.start, point.end], shape)
            row[...] = slerp(start, end, point.position)
        else:
            _generator(point, _NOISE_STREAM).standard_normal(dtype=np.float32, out=row)
    return out


def slerp(start: np.ndarray, end: np.ndarray, position: float) -> np.ndarray:
    """Spherical interpolation between two noises, both float32 of one shape: float32 of that shape.

    position: t in [0, 1]. With w the angle between a (start) and b (end),

        z(t) = ((1 - t) |a| + t |b|) (sin((1 - t) w) a/|a| + sin(t w) b/|b|) / sin w.

    The direction turns at constant speed (Shoemake 1985) and the norm changes linearly, so every z(t) has a norm that is
    typical of noise. A straight line would pass closer to 0, where the generator was not trained. Both ends are exact. For
    parallel or opposite directions the formula is undefined, and the straight line is used.
    """
    if position <= 0.0 or position >= 1.0:
        return (start if position <= 0.0 else end).copy()
    # In double precision: the angle of nearly parallel vectors is lost to rounding in float32.
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
    """A point for each position on the path through the seeds: 0 is the first seed, 1.5 is half-way from second to third.

    A whole position returns its seed. Raises RequestError for an empty list of seeds, or a position outside the path.
    """
    seeds, last = checked_seeds(seeds), len(seeds) - 1
    if last < 0:
        raise RequestError("the walk has no seeds", remedy="give at least one, such as [7, 8]", param="seeds")
    points: list[NoisePoint] = []
    for position in positions:
        if not 0.0 <= position <= last:  # written so that nan is refused too
            raise RequestError(
                f"position {position:g} is not on the walk", remedy=f"choose positions from 0 to {last}", param="positions"
            )
        index, rest = int(position), position - int(position)
        points.append(Between(seeds[index], seeds[index + 1], rest) if rest else seeds[index])
    return points


def random_class_ids(seeds: Sequence[int], num_classes: int, shares: np.ndarray | None = None) -> np.ndarray:
    """A class id in 0..num_classes-1 for each seed, independent of the seed's noise: int64 [len(seeds)].

    Classes are drawn uniformly, or in proportion to `shares` [num_classes], which need not sum to 1.
    """
    if shares is None:
        return np.array([_generator(seed, _CLASS_STREAM).integers(num_classes) for seed in seeds], dtype=np.int64)
    # Inverse transform sampling with u uniform on [0, 1) and s the sum of all shares:
    # class k if (s_0 + .. + s_(k-1)) / s <= u < (s_0 + .. + s_k) / s.
    ends = np.cumsum(shares, dtype=np.float64)
    drawn = np.array([_generator(seed, _CLASS_STREAM).random() for seed in seeds])
    return np.searchsorted(ends / ends[-1], drawn, side="right").astype(np.int64)


def parse_seeds(text: str) -> list[int]:
    """Parse seeds from '7', '0-63' or '1,5,10-12' (both ends included). Raises RequestError for anything else."""
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
            raise RequestError(f"seeds '{text[:60]}' are more than {MAX_SEEDS}", remedy="give fewer seeds", param="seeds")
        seeds.extend(range(start, stop + 1))
    return seeds


def checked_seeds(seeds: Sequence[int] | np.ndarray) -> Sequence[int]:
    """The seeds as a sequence. Raises RequestError unless they are a sequence of integers in [0, 2**63)."""
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Sequence):
        raise RequestError(
            f"seeds {str(seeds)[:60]!r} are not a list", remedy="give integers, such as [7, 8] or range(64)", param="seeds"
        )
    # Of a range only both ends are checked: it may have millions of seeds.
    for seed in (seeds[0], seeds[-1]) if isinstance(seeds, range) and seeds else seeds:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < SEED_LIMIT:
            raise RequestError(
                f"seed {seed!r} is not an integer in [0, 2**63)",
                remedy="choose seeds from 0 to 9223372036854775807",
                param="seeds",
            )
    return seeds


def checked_class_ids(spec: ModelSpec, class_ids: ArrayLike | ClassMixture | None, count: int) -> ClassIds | None:
    """The ids as int64 [count], or `count` mixtures; None if and only if the generator is unconditional.

    Raises RequestError for anything else.
    """
    if class_ids is None and spec.num_classes:
        raise RequestError(
            f"generator '{spec.name}' has {spec.num_classes} classes, but no class ids were given",
            remedy="give one for each image, or call generate_images, which draws them from the seeds",
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
    """The class ids as int64 [count], for a generator with classes. Raises RequestError for a wrong type, number or range."""
    ids = _array(class_ids, "class ids")
    if ids.dtype.kind not in "iu" or ids.shape != (count,):
        raise RequestError(
            f"class ids are {ids.dtype} {list(ids.shape)}, not integers [{count}]",
            remedy="give an id for each image",
            param="class_ids",
        )
    outside = (ids < 0) | (ids >= spec.num_classes)
    if outside.any():
        spec.class_id(int(ids[outside][0]))  # raises the error for an unknown class
    return _contiguous(ids.astype(np.int64, copy=False))


def checked_share(share: ArrayLike, count: int | None = None) -> np.ndarray:
    """The shares of mixtures as float32 [count]. If count is None, any number of shares is accepted.

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
    inside = (shares >= 0) & (shares <= 1)  # written so that nan is refused too
    if not inside.all():
        raise RequestError(
            f"share {shares[~inside][0]:g} is outside 0..1",
            remedy="give 0 for the first class, 1 for the second, 0.5 for half of each",
            param="share",
        )
    return _contiguous(shares.astype(np.float32, copy=False))


def checked_inputs(spec: ModelSpec, noise: ArrayLike, class_ids: ArrayLike | ClassMixture | None) -> Inputs:
    """Check an engine's inputs. Raises RequestError unless they are the noise and class ids of B >= 1 images of the spec.

    Class ids may be a list or an array of any integer type, or mixtures of two classes. Noise must be float32: a silent cast
    could hide that the array is not noise.
    """
    z = _array(noise, "noise")
    if z.dtype != np.float32:
        raise RequestError(f"noise is {z.dtype}, not float32", remedy="give noise.astype('float32')", param="noise")
    if z.ndim != 4 or z.shape[1:] != tuple(spec.noise_shape) or not len(z):
        raise RequestError(
            f"noise has shape {list(z.shape)}, not [B, {', '.join(map(str, spec.noise_shape))}] with B >= 1",
            remedy="make it with uni_instruct.noise.noise(seeds, spec.noise_shape)",
            param="noise",
        )
    return Inputs(_contiguous(z), checked_class_ids(spec, class_ids, len(z)))


def round_robin_class_ids(spec: ModelSpec, count: int) -> np.ndarray | None:
    """Class ids 0, 1, ..., repeated cyclically to `count`, so that all classes occur if possible: int64 [count], or None."""
    return np.arange(count, dtype=np.int64) % spec.num_classes if spec.num_classes else None


def _array(values: ArrayLike, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; a torch tensor on a GPU, or one with a gradient
        reason = " ".join(str(error).split())[:100]
        raise RequestError(f"{name} cannot be read as an array: {reason}", remedy="give a NumPy array", param=name) from error


def _contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself if it is C-contiguous and writable, else a copy.

    Runtimes share its memory: torch warns about read-only arrays and refuses negative strides.
    """
    return array if array.flags.carray else array.copy()


class _Philox(threading.local):
    """One Philox generator per thread, reset to a key and to the start of its stream. A new one takes twenty times as long."""

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
    """The counter-based generator with key (seed, stream), at its start. The thread's next call resets the same object."""
    return _philox.at(seed, stream)
