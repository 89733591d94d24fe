"""reference.npz: seeds of a bundle and torch's images of them, to check engines on any machine without torch."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np

from uni_instruct.errors import BundleError
from uni_instruct.noise import noise
from uni_instruct.spec import ModelSpec

REFERENCE = "reference.npz"
REFERENCE_IMAGES = 16
# The first bytes of an .npz file, which is a zip.
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The content of reference.npz: seeds, and the images that torch made of them in fp32 on a CPU.

    seeds: int64 [N]. class_ids: int64 [N], None for an unconditional model. images: float32 [N, C, H, W].
    weights_sha256: the hash of the stored weights that made the images.
    """

    seeds: np.ndarray
    class_ids: np.ndarray | None
    images: np.ndarray
    weights_sha256: str

    def noise(self, spec: ModelSpec) -> np.ndarray:
        """The N(0, 1) noise of the seeds: float32 [N, *noise_shape]."""
        return noise(self.seeds.tolist(), spec.noise_shape)

    def write(self, path: Path) -> None:
        """Write the file. The same reference always makes the same bytes."""
        classes = {} if self.class_ids is None else {"class_ids": self.class_ids}
        arrays = {"seeds": self.seeds, **classes, "images": self.images, "weights_sha256": np.array(self.weights_sha256)}
        with path.open("wb") as file:  # an open file, because NumPy appends .npz to the temporary names given here
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, path: Path, spec: ModelSpec, weights_sha256: str) -> "Reference":
        """Read and check the file. Raises BundleError if it is damaged, or does not belong to this model and these weights."""
        remedy = f"'uni-instruct export {quote(str(path.parent))} --to onnx' writes it again"
        try:
            with path.open("rb") as file:
                # NumPy would take any other file for a pickle, and its error would suggest to allow pickles.
                if file.read(len(_ZIP)) != _ZIP:
                    raise ValueError("it is not an npz file")
            with np.load(path, allow_pickle=False) as data:
                found = cls(
                    seeds=data["seeds"],
                    class_ids=data["class_ids"] if spec.num_classes else None,
                    images=data["images"],
                    weights_sha256=str(data["weights_sha256"]),
                )
        except Exception as error:  # the zip and npy parsers raise many types for damaged files, MemoryError among them
            raise BundleError(f"{path} cannot be read: {' '.join(str(error).split())[:100]}", remedy=remedy) from error
        if found.weights_sha256 != weights_sha256:
            raise BundleError(f"{path} was made from other weights than those in its folder", remedy=remedy)
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
    """The seeds of a reference and their class ids, int64 [N] with N <= REFERENCE_IMAGES; no ids without classes.

    The images cover all classes, or classes at equal distances if there are more classes than images. For the large pictures
    of a decoder N is smaller: four of 512x512 are 12 MB and take a CPU minutes.
    """
    count = spec.images_for_check(2 * REFERENCE_IMAGES) // 2
    seeds = np.arange(count, dtype=np.int64)
    if not spec.num_classes:
        return seeds, None
    return seeds, seeds % spec.num_classes if spec.num_classes <= len(seeds) else seeds * spec.num_classes // len(seeds)
