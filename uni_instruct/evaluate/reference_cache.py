"""A cache of references' features on disk. The key is the data's fingerprint and the extractor's hash."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uni_instruct.data import Dataset
from uni_instruct.data.storage import UNREADABLE
from uni_instruct.errors import DiskError
from uni_instruct.evaluate.extractors import Extractor
from uni_instruct.system.files import atomic_file, cache_folder


class ReferenceFeatures(NamedTuple):
    """features: float32 [K, D] of all images or of evenly spaced ones. mu, sigma: float64 [D] and [D, D] of all images."""

    features: np.ndarray
    mu: np.ndarray
    sigma: np.ndarray


class ReferenceCache:
    """The cached file of one reference with one extractor. Nothing is cached for an extractor without a hash."""

    def __init__(self, reference: Dataset, extractor: Extractor):
        self.path: Path | None = None
        if extractor.sha256:
            # The device is in the name because features from a GPU and a CPU differ in their last bits.
            name = f"{reference.fingerprint()[:32]}-{extractor.sha256[:16]}-{extractor.device}.npz"
            self.path = cache_folder() / "references" / name

    def read(self) -> ReferenceFeatures | None:
        """The cached features; None if there are none, or the file is damaged."""
        if self.path is None:
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return ReferenceFeatures(file["features"], file["mu"], file["sigma"])
        except UNREADABLE:
            return None

    def write(self, found: ReferenceFeatures) -> None:
        """Write the features. A full or read-only disk is not an error, because they can be computed again."""
        if self.path is None:
            return
        with suppress(DiskError), atomic_file(self.path) as partial, partial.open("wb") as file:
            np.savez(file, **found._asdict())
