"""A VAE's latents in the format of EDM2's data set tool: .npy files of mean and standard deviation.

Latents are drawn from these at each use.
"""

import io
from collections.abc import Sequence

import numpy as np

from uni_instruct.data.storage import UNREADABLE, Store, has_suffix, name_in_store, reason_of
from uni_instruct.errors import FileFormatError
from uni_instruct.noise import noise

_SUFFIXES = frozenset({".npy"})
# Mean and standard deviation of each latent channel of Stability AI's VAE (sd-vae-ft-mse) over ImageNet, as EDM2 assumes them
# (arXiv 2312.02696 and its code); and the standard deviation that latents are scaled to, which is sigma_data.
RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
RAW_STD = (4.17, 4.62, 3.71, 3.28)
FINAL_STD = 0.5
CHANNELS = len(RAW_MEAN)


class LatentReader:
    """Reads mean and standard deviation from the named files: float32 [B, 8, H, W], the four means first."""

    def __init__(self, store: Store, names: list[str], size: tuple[int, int]):
        self.store, self.names, self.size = store, names, size

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """See ImageReader. Raises FileFormatError, which names the file, if one cannot be read or has another size."""
        out = np.empty((len(indices), 2 * CHANNELS, *self.size), dtype=np.float32)
        for row, index in zip(out, indices, strict=True):
            row[...] = self._moments(self.names[index])
        return out

    def _moments(self, name: str) -> np.ndarray:
        moments = read_moments(self.store, name)
        if moments.shape[1:] != self.size:
            raise FileFormatError(
                f"{name_in_store(self.store, name)} is {_text(moments.shape[1:])}, other latents are {_text(self.size)}",
                remedy="encode all images at one resolution",
            )
        return moments


def read_moments(store: Store, name: str) -> np.ndarray:
    """Mean and standard deviation in one file: float32 [8, H, W]. Nothing in it is executed. Raises FileFormatError."""
    try:
        moments = np.load(io.BytesIO(store.read(name)), allow_pickle=False)
    except UNREADABLE as error:
        raise _wrong(store, name, f"cannot be read: {reason_of(error)}") from error
    if not isinstance(moments, np.ndarray) or moments.dtype.kind != "f" or moments.ndim != 3 or len(moments) != 2 * CHANNELS:
        found = f"{moments.dtype} {list(moments.shape)}" if isinstance(moments, np.ndarray) else "an archive"
        raise _wrong(store, name, f"is {found}, not float32 [{2 * CHANNELS}, H, W] of mean and deviation")
    if not np.isfinite(moments).all() or (moments[CHANNELS:] < 0).any():
        raise _wrong(store, name, "has values that are not finite, or deviations below zero")
    return moments.astype(np.float32)


def moments_bytes(moments: np.ndarray) -> bytes:
    """The bytes of an .npy file with mean and standard deviation, float32 [8, H, W]."""
    buffer = io.BytesIO()
    np.save(buffer, moments)
    return buffer.getvalue()


def draw_latents(moments: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Draw from each N(mean, deviation^2), scaled to mean 0 and standard deviation 0.5 over ImageNet: float32 [B, H, W, 4].

    moments is float32 [B, 8, H, W]. Latent i depends on moments[i] and seeds[i] only.
    """
    # z = mean + std * eps, then per channel (z - RAW_MEAN) * FINAL_STD / RAW_STD: the reparametrised draw of a VAE (arXiv
    # 1312.6114, section 2.4), and EDM2's scaling to the sigma_data that networks expect.
    mean, std = moments[:, :CHANNELS], moments[:, CHANNELS:]
    raw = mean + noise(seeds, mean.shape[1:]) * std
    offset, scale = (np.array(values, np.float32).reshape(CHANNELS, 1, 1) for values in (RAW_MEAN, RAW_STD))
    final: np.ndarray = (raw - offset) * (FINAL_STD / scale)
    return final.transpose(0, 2, 3, 1)


def is_latent(name: str) -> bool:
    """Whether a file name has the suffix of latents and is not hidden."""
    return has_suffix(name, _SUFFIXES)


def _wrong(store: Store, name: str, problem: str) -> FileFormatError:
    return FileFormatError(f"{name_in_store(store, name)} {problem}", remedy="replace or remove that file")


def _text(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
