"""reference.npz: seeds of a bundle and torch's images of them. Engines on any machine are held against them, without torch."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np

from uni_instruct.errors import BundleError
from uni_instruct.noise import noise
from uni_instruct.spec import ModelSpec

REFERENCE = "reference.npz"
REFERENCE_IMAGES = 16
# What an npz begins with.
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """seeds int64 [N]; class_ids int64 [N], None without classes; images float32 [N, C, H, W], torch's, in fp32 on the CPU.

    weights_sha256 is the hash of the stored weights that made them.
    """

    seeds: np.ndarray
    class_ids: np.ndarray | None
    images: np.ndarray
    weights_sha256: str

    def noise(self, spec: ModelSpec) -> np.ndarray:
        """The N(0, 1) noise of the seeds: float32 [N, *noise_shape]."""
        return noise(self.seeds.tolist(), spec.noise_shape)

    def write(self, path: Path) -> None:
        """Writes the file; the same reference gives the same bytes."""
        classes = {} if self.class_ids is None else {"class_ids": self.class_ids}
        arrays = {"seeds": self.seeds, **classes, "images": self.images, "weights_sha256": np.array(self.weights_sha256)}
        with path.open("wb") as file:  # given a name, NumPy appends .npz to it
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, path: Path, spec: ModelSpec, weights_sha256: str) -> "Reference":
        """The reference of a model of those weights. Raises BundleError where the file is damaged or of anything else."""
        remedy = f"'uni-instruct export {quote(str(path.parent))} --to onnx' writes it anew"
        try:
            with path.open("rb") as file:
                if file.read(len(_ZIP)) != _ZIP:  # NumPy would take it for a pickle, and say how to run it
                    raise ValueError("it is no npz file")
            with np.load(path, allow_pickle=False) as data:
                found = cls(
                    seeds=data["seeds"],
                    class_ids=data["class_ids"] if spec.num_classes else None,
                    images=data["images"],
                    weights_sha256=str(data["weights_sha256"]),
                )
        except Exception as error:  # the parsers of zip and npy fail in any way that code can, for want of memory too
            raise BundleError(f"{path} cannot be read: {' '.join(str(error).split())[:100]}", remedy=remedy) from error
        if found.weights_sha256 != weights_sha256:
            raise BundleError(f"{path} is of other weights than those beside it", remedy=remedy)
        if not found._fits(spec):
            raise BundleError(f"{path} does not hold images of generator '{spec.name}'", remedy=remedy)
        return found

    def _fits(self, spec: ModelSpec) -> bool:
        count = len(self.images) if self.images.ndim else 0
        if not count or self.images.dtype != np.float32 or self.images.shape[1:] != spec.image_shape:
            return False
        if self.seeds.dtype != np.int64 or self.seeds.shape != (count,) or self.seeds.min() < 0:
            return False
        if self.class_ids is None:
            return True
        whole = self.class_ids.dtype == np.int64 and self.class_ids.shape == (count,)
        return whole and self.class_ids.min() >= 0 and self.class_ids.max() < spec.num_classes


def reference_inputs(spec: ModelSpec) -> tuple[np.ndarray, np.ndarray | None]:
    """Seeds and class ids of a reference, int64 [REFERENCE_IMAGES]: of every class, or of as many as there is room for.

    Of the large pictures that a decoder makes there are fewer: four of 512x512 are 12 MB, and minutes of a CPU.
    """
    count = spec.affordable_images(2 * REFERENCE_IMAGES) // 2
    seeds = np.arange(count, dtype=np.int64)
    if not spec.num_classes:
        return seeds, None
    return seeds, seeds % spec.num_classes if spec.num_classes <= len(seeds) else seeds * spec.num_classes // len(seeds)
