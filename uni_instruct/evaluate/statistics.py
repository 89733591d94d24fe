"""A reference as mean and covariance alone: EDM's .npz of mu and sigma, to which ours adds what made them, or EDM2's .pkl."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uni_instruct.checkpoints.pickle.unpickle import read_pickle
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.data.sources import read_npz
from uni_instruct.errors import FileFormatError
from uni_instruct.evaluate.extractors import INCEPTION, INCEPTION_DIM
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
    """What images are compared with: a data set as `open_dataset` takes it, or an .npz or .pkl that holds mu and sigma.

    Where an .npz holds images as well (OpenAI's reference batches), mu and sigma are taken: they are of the whole data set, the
    images are a part of it. Nothing in a .pkl is executed. Raises RequestError for latents, FileFormatError for a file that is
    corrupt or holds neither.
    """
    path = Path(source)
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix == ".pkl":
        return _edm2_statistics(path)
    if suffix == ".npz":
        arrays = read_npz(path, ("mu", "sigma", "extractor", "extractor_sha256", "fingerprint", "samples", "name"))
        if "mu" in arrays or "sigma" in arrays:
            return _statistics(path, arrays)
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


def _edm2_statistics(path: Path) -> Statistics:
    """Those of InceptionV3 in EDM2's {'fid': {mu, sigma}, 'fd_dinov2': {mu, sigma}, num_images}."""
    content = read_pickle(path)
    fid = content.get("fid") if isinstance(content, dict) else None
    if not isinstance(fid, dict):
        found = f"keys {', '.join(map(str, content))[:80]}" if isinstance(content, dict) else type(content).__name__
        raise FileFormatError(
            f"{path} holds no reference statistics but {found}",
            remedy="give a file that EDM2's calculate_metrics.py wrote, or an .npz of mu and sigma",
        )
    # Its num_images is left out. It is all of ImageNet, and `evaluate` would generate as many; 50,000 are the custom.
    return _statistics(path, {name: fid[name] for name in ("mu", "sigma") if name in fid})


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
