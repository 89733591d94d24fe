"""A reference as the mean and covariance of its features: EDM's .npz, ours (which adds their origin), or EDM2's .pkl."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uni_instruct.checkpoints.budget import Limits
from uni_instruct.checkpoints.checkpoint import read_plain
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.data.sources import is_npz, read_npz
from uni_instruct.errors import FileFormatError
from uni_instruct.evaluate.extractors import INCEPTION, INCEPTION_DIM
from uni_instruct.system.file_type import FileType, file_type
from uni_instruct.system.files import atomic_file


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """The mean mu float64 [D] and covariance sigma float64 [D, D] (divided by N - 1) of a reference's features.

    samples: the number of images; 0 if it is unknown. fingerprint: of the data set whose classifier is the extractor; empty for
    other extractors.
    """

    name: str
    mu: np.ndarray
    sigma: np.ndarray
    extractor: str = INCEPTION
    extractor_sha256: str = ""
    fingerprint: str = ""
    samples: int = 0

    def __len__(self) -> int:
        return self.samples


def open_reference(source: str | Path) -> Dataset | Statistics:
    """Open what images are compared with: a data set, as `open_dataset` does, or a file of statistics.

    Statistics are recognised by the file's content: an .npz of mu and sigma (or mean and cov), an .npz of InceptionV3's
    features (pool_3, feats, features), EDM2's pickle, or torch-fidelity's .pt. If an .npz has images too, as OpenAI's reference
    batches do, its mu and sigma are used: they are of the whole data set, while the images are a part of it. No code in a file
    is run.

    Raises RequestError for latents, FileFormatError for a file that is corrupt or contains neither images nor statistics.
    """
    path = Path(source)
    kind = file_type(path) if path.is_file() and "," not in str(source) else None
    if kind is FileType.PICKLE or kind is FileType.TORCH:
        return _pickled_statistics(path)
    if kind is not None and is_npz(path):
        names = ("mu", "sigma", "mean", "cov", *_FEATURES)
        arrays = read_npz(path, (*names, "extractor", "extractor_sha256", "fingerprint", "samples", "name", "arr_0"))
        if any(name in arrays for name in names) and ("arr_0" not in arrays or "mu" in arrays or "mean" in arrays):
            return _statistics(path, _of_other_tools(path, arrays))
    dataset = open_dataset(source)
    dataset.require_images()
    return dataset


def write_statistics(statistics: Statistics, path: Path) -> None:
    """Write the .npz atomically. EDM's tools can read its mu and sigma. Raises DiskError."""
    with atomic_file(Path(path)) as partial, partial.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mu,
            sigma=statistics.sigma,
            extractor=statistics.extractor,
            extractor_sha256=statistics.extractor_sha256,
            fingerprint=statistics.fingerprint,
            samples=statistics.samples,
            name=statistics.name,
        )


def _pickled_statistics(path: Path) -> Statistics:
    """InceptionV3's statistics from a pickle of EDM2 or torch-fidelity.

    EDM2's is {'fid': {mu, sigma}, 'fd_dinov2': {mu, sigma}, num_images}, torch-fidelity's {mu, sigma}.
    """
    content = read_plain(path, _LIMITS)
    parts = content if isinstance(content, dict) else {}
    fid = parts if "mu" in parts else parts.get("fid")
    if not isinstance(fid, dict):
        found = f"keys {', '.join(map(str, content))[:80]}" if isinstance(content, dict) else type(content).__name__
        raise FileFormatError(
            f"{path} contains no reference statistics, only {found}",
            remedy="give a file that EDM2's calculate_metrics.py wrote, or an .npz of mu and sigma",
        )
    # EDM2's num_images is not used. It counts all of ImageNet, and `evaluate` would generate as many; 50,000 are customary.
    return _statistics(path, {name: fid[name] for name in ("mu", "sigma") if name in fid})


# Pickles of protocol 2 store an array's bytes as text: 50 MB for a sigma of 2048 x 2048. So the limit for text is raised.
_LIMITS = Limits(text_bytes=256 << 20)
# Other tools' names for InceptionV3's features of all images: pool_3 in OpenAI's evaluator, feats in clean-fid for KID.
_FEATURES = ("pool_3", "feats", "features")


def _of_other_tools(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Rename other tools' arrays to mu and sigma, or compute these from features. Raises FileFormatError for bad features."""
    named = dict(arrays)
    for usual, other in (("mu", "mean"), ("sigma", "cov")):
        if usual not in named and other in named:
            named[usual] = named[other]
    name = next((name for name in _FEATURES if name in named), None)
    if name is None or "mu" in named:
        return named
    features = np.asarray(named[name])
    features = features.reshape(len(features), -1) if features.ndim > 2 else features
    if features.ndim != 2 or features.dtype.kind != "f" or len(features) < 2:
        found = f"{name} of {features.dtype} {list(features.shape)}"
        raise FileFormatError(f"{path} has {found}", remedy=f"give features [N, {INCEPTION_DIM}], or mu and sigma")
    exact = features.astype(np.float64)
    return named | {"mu": exact.mean(0), "sigma": np.cov(exact, rowvar=False), "samples": len(features)}


def _statistics(path: Path, arrays: Mapping[str, Any]) -> Statistics:
    """Statistics from arrays by name. Without the additional names of `write_statistics`, they must be InceptionV3's.

    Raises FileFormatError for missing, non-finite or wrongly shaped arrays.
    """
    try:
        mu, sigma = (np.asarray(arrays.get(name, 0.0), dtype=np.float64) for name in ("mu", "sigma"))
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"mu and sigma in {path} are not numbers", remedy="give mu [D] and sigma [D, D]") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise FileFormatError(
            f"{path} has mu {list(mu.shape)} and sigma {list(sigma.shape)}, or values that are not finite",
            remedy="give finite mu [D] and sigma [D, D]",
        )
    extractor = str(arrays.get("extractor", INCEPTION))
    # Statistics of other extractors (DINOv2's with 768 or 1024 features) differ from InceptionV3's in size only.
    if extractor == INCEPTION and len(mu) != INCEPTION_DIM:
        raise FileFormatError(
            f"{path} has {len(mu)} features, but {INCEPTION} has {INCEPTION_DIM}",
            remedy="write statistics of another extractor with --save-statistics",
        )
    return Statistics(
        name=str(arrays.get("name", path.stem)),
        mu=mu,
        sigma=sigma,
        extractor=extractor,
        extractor_sha256=str(arrays.get("extractor_sha256", "")),
        fingerprint=str(arrays.get("fingerprint", "")),
        samples=int(arrays.get("samples", 0)),
    )
