"""A reference as mean and covariance alone: EDM's .npz of mu and sigma, to which ours adds what made them, or EDM2's .pkl."""

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
from uni_instruct.file_type import FileType, file_type
from uni_instruct.files import atomic_file


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """mu float64 [D] and sigma float64 [D, D] (divided by N - 1) of a reference's features.

    samples is 0 where it is not known. fingerprint is that of the data set whose classifier made them, empty for InceptionV3.
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
    """What images are compared with: a data set as `open_dataset` takes it, or a file of statistics, known by its content.

    Those are mu and sigma (or mean and cov), or InceptionV3's features themselves (pool_3, feats), in an .npz; EDM2's pickle;
    and torch-fidelity's .pt. Where an .npz holds images as well (OpenAI's reference batches), mu and sigma are taken: they are
    of the whole data set, the images are a part of it. Nothing in a file is executed. Raises RequestError for latents,
    FileFormatError for a file that is corrupt or holds neither.
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
    """Writes the .npz whole or not at all; EDM's tools read its mu and sigma. Raises DiskError."""
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
    """EDM2's {'fid': {mu, sigma}, 'fd_dinov2': {mu, sigma}, num_images}, or torch-fidelity's {mu, sigma}, of InceptionV3."""
    content = read_plain(path, _LIMITS)
    parts = content if isinstance(content, dict) else {}
    fid = parts if "mu" in parts else parts.get("fid")
    if not isinstance(fid, dict):
        found = f"keys {', '.join(map(str, content))[:80]}" if isinstance(content, dict) else type(content).__name__
        raise FileFormatError(
            f"{path} holds no reference statistics but {found}",
            remedy="give a file that EDM2's calculate_metrics.py wrote, or an .npz of mu and sigma",
        )
    # Its num_images is left out. It is all of ImageNet, and `evaluate` would generate as many; 50,000 are the custom.
    return _statistics(path, {name: fid[name] for name in ("mu", "sigma") if name in fid})


# In pickles of protocol 2 a sigma of 2048 x 2048 is text, 50 MB of it, which is turned into bytes.
_LIMITS = Limits(text_bytes=256 << 20)
# What other tools call InceptionV3's features of every image: OpenAI's evaluator and pytorch-fid's kin, clean-fid's for KID.
_FEATURES = ("pool_3", "feats", "features")


def _of_other_tools(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """mu and sigma under their usual names, computed from features where those are given. Raises FileFormatError."""
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
    """Statistics of those arrays. Without the names that `write_statistics` adds they are EDM's, made by InceptionV3."""
    try:
        mu, sigma = (np.asarray(arrays.get(name, 0.0), dtype=np.float64) for name in ("mu", "sigma"))
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"mu and sigma in {path} are not numbers", remedy="give mu [D] and sigma [D, D]") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise FileFormatError(
            f"{path} has mu {list(mu.shape)} and sigma {list(sigma.shape)}", remedy="give finite mu [D] and sigma [D, D]"
        )
    extractor = str(arrays.get("extractor", INCEPTION))
    # Files of other extractors (DINOv2's, 768 or 1024) look the same otherwise.
    if extractor == INCEPTION and len(mu) != INCEPTION_DIM:
        raise FileFormatError(
            f"{path} has {len(mu)} features, {INCEPTION} has {INCEPTION_DIM}", remedy="write it with --save-statistics"
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
