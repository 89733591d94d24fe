"""Feature extractors: InceptionV3, a classifier trained on the reference, or CLIP and DINOv2."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uni_instruct.data import Dataset
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate.classifier_file import FEATURES, classifier_path, read_classifier, weights_sha256
from uni_instruct.evaluate.fidelity import create_extractor, fidelity
from uni_instruct.images import checked_images
from uni_instruct.networks.float32 import full_float32
from uni_instruct.spec import ImageShape
from uni_instruct.system.download import download
from uni_instruct.system.files import sha256
from uni_instruct.system.progress import ProgressFactory, silent

if TYPE_CHECKING:
    import torch

# The extractors for training and evaluation. Evaluation also has networks whose weights the user provides (pretrained.py).
EXTRACTORS = ("auto", "inception", "classifier")
PRETRAINED = (
    *("clip-vit-b-32", "clip-vit-b-16", "clip-vit-l-14", "clip-vit-l-14-336px"),
    *("dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14"),
)
INCEPTION = "inception-v3"
INCEPTION_REGISTERED = "inception-v3-compat"  # its name in torch-fidelity
INCEPTION_DIM = 2048
INCEPTION_MIN_SIDE = 32
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Features:
    """Features float32 [N, D] and class logits float32 [N, K] of N images: torch tensors on the CPU."""

    features: "torch.Tensor"
    logits: "torch.Tensor"

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, kw_only=True)
class ExtractorFile:
    """What a worker needs to open an extractor.

    path: of its weights. maker: 'inception', 'classifier' or one of PRETRAINED. label: the weights' SHA-256; for a classifier,
    its name.
    """

    path: Path
    maker: str
    label: str

    def open(self) -> "Extractor":
        """Open the extractor. Raises FileFormatError if the file is corrupt."""
        if self.maker in PRETRAINED:
            return open_pretrained(self.maker, self.path, self.label)
        return open_inception(self.path, self.label) if self.maker == "inception" else open_classifier(self.path, self.label)


class LazyNetwork:
    """A network that is loaded at its first call. A process that leaves the work to workers needs neither it nor torch."""

    def __init__(self, load: "Callable[[], torch.nn.Module]"):
        self._load = load

    @cached_property
    def network(self) -> "torch.nn.Module":
        """The network, loaded at the first access."""
        return self._load()

    def __call__(self, pixels: "torch.Tensor") -> "Sequence[torch.Tensor]":
        """The network's outputs."""
        found: Sequence[torch.Tensor] = self.network(pixels)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Extractor:
    """A network from images uint8 [B, C, H, W] to (features, logits), ready to run.

    image_shape: the only [C, H, W] that it accepts, or None for any.
    num_classes: of the reference; 0 if the logits are of other classes.
    heldout_accuracy: of a trained classifier, on held-out images.
    takes_colour: grey images are repeated to three channels.
    resizing: how it resizes images, in words. Tools differ in this, and with it their scores.
    """

    name: str
    sha256: str
    dim: int
    module: "torch.nn.Module | LazyNetwork"
    device: str = "cpu"
    image_shape: ImageShape | None = None
    num_classes: int = 0
    heldout_accuracy: float | None = None
    fingerprint: str = ""
    takes_colour: bool = False
    resizing: str = ""
    file: "ExtractorFile | None" = None

    @property
    def is_inception(self) -> bool:
        """Whether it is InceptionV3, so that its scores may be called FID, KID and IS."""
        return self.name == INCEPTION

    def required_file(self) -> ExtractorFile:
        """What workers open it from. Raises RequestError if it has no file, but exists in this process only."""
        if self.file is None:
            raise RequestError(
                f"extractor {self.name} exists in this process only, so workers cannot load it",
                remedy="score without workers",
                param="extractor",
            )
        return self.file

    def __call__(self, batches: Iterable[np.ndarray]) -> Features:
        """The features of images uint8 [B, H, W, C]. They do not depend on the batches or the memory layout.

        Raises RequestError if there are no images, or for floats in place of pixels.
        """
        import torch

        features, logits = [], []
        for images in _rebatched(map(checked_images, batches)):
            # Always contiguous, because the last bits of a convolution depend on the memory layout.
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format).to(self.device)
            if self.takes_colour and pixels.shape[1] == 1:
                pixels = pixels.expand(-1, 3, -1, -1)
            # Published FIDs use float32. With TF32, cuDNN's default, a GPU's features differ from a CPU's.
            with torch.inference_mode(), full_float32():
                first, second = self.module(pixels)
            features.append(first.cpu())
            logits.append(second.cpu())
        if not features:
            raise RequestError("there are no images to score", remedy="give at least one", param="images")
        # Cloned outside inference mode, because torch-fidelity's metrics cannot use inference tensors.
        with torch.inference_mode(False):
            return Features(torch.cat(features).clone(), torch.cat(logits).clone())


def choose_extractor(name: str, dataset: Dataset, with_progress: ProgressFactory = silent) -> Extractor:
    """The extractor of that name (one of EXTRACTORS or PRETRAINED) for a reference.

    'auto' is InceptionV3 for colour images of at least 32 pixels a side and for data without classes, else the classifier.
    Raises RequestError for an unknown name, or if the weights are not available.
    """
    if name in PRETRAINED:
        return pretrained(name)
    if name not in EXTRACTORS:
        raise RequestError(f"extractor '{name}' is unknown", remedy=f"choose one of {', '.join(EXTRACTORS)}", param="extractor")
    if name == "auto":
        # InceptionV3 was trained on colour photographs of 299 pixels. Its features say little about grey or tiny images.
        channels, *sides = dataset.image_shape
        suits = channels == 3 and min(sides) >= INCEPTION_MIN_SIDE
        name = "inception" if suits or dataset.num_classes < 2 else "classifier"
    return inception(has_classes=dataset.num_classes > 1) if name == "inception" else classifier(dataset, with_progress)


def classifier(dataset: Dataset, with_progress: ProgressFactory = silent) -> Extractor:
    """The data set's classifier: the shipped one, the cached one, or one that is trained now. It has the data set's name."""
    path = classifier_path(dataset.fingerprint())
    try:
        read_classifier(path)  # an existing file can be read without torch
    except FileFormatError:
        from uni_instruct.evaluate.classifier import trained_classifier

        path = trained_classifier(dataset, with_progress)
    return open_classifier(path, f"{dataset.name}-classifier")


def open_classifier(path: Path, name: str) -> Extractor:
    """A classifier from its file. Raises FileFormatError if it is corrupt."""
    weights, info = read_classifier(path)

    def network() -> "torch.nn.Module":
        from uni_instruct.evaluate.classifier import open_features

        return open_features(path)

    return Extractor(
        name=name,
        sha256=weights_sha256(weights),
        dim=FEATURES,
        module=LazyNetwork(network),
        image_shape=info.image_shape,
        num_classes=info.num_classes,
        heldout_accuracy=info.heldout_accuracy,
        fingerprint=info.fingerprint,
        file=ExtractorFile(path=path, maker="classifier", label=name),
    )


def inception(has_classes: bool = False) -> Extractor:
    """InceptionV3 with the weights that define FID. has_classes: whether the error may suggest the classifier instead.

    Raises RequestError if the weights are not on this machine and cannot be downloaded.
    """
    return open_inception(*inception_weights(", or use --extractor classifier" if has_classes else ""))


def open_inception(path: Path, digest: str) -> Extractor:
    """InceptionV3 from a file with that SHA-256, on a GPU if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The network draws random weights before it loads the real ones. The fork preserves the caller's random state.
    with torch.random.fork_rng(devices=[]):
        module = create_extractor(INCEPTION_REGISTERED, [str(INCEPTION_DIM), "logits_unbiased"], path).to(device)
    file = ExtractorFile(path=path, maker="inception", label=digest)
    return Extractor(
        name=INCEPTION,
        sha256=digest,
        dim=INCEPTION_DIM,
        module=module,
        device=device,
        takes_colour=True,
        resizing="bilinear as TensorFlow 1 to 299x299, no antialiasing (torch-fidelity's, as the original FID)",
        file=file,
    )


def pretrained(name: str, path: Path | None = None) -> Extractor:
    """CLIP or DINOv2, by a name from PRETRAINED. path: of its weights; by default the caches of torch and CLIP are searched.

    Raises RequestError if there are no weights; it names the file and the folder to put it in. Raises FileFormatError for a
    wrong file.
    """
    from uni_instruct.evaluate.pretrained import find_weights

    return open_pretrained(name, *find_weights(name, path))


def open_pretrained(name: str, path: Path, digest: str) -> Extractor:
    """CLIP or DINOv2 from a file with that SHA-256, on a GPU if there is one. Raises FileFormatError for a wrong file."""
    import torch

    from uni_instruct.evaluate.pretrained import open_network

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = open_network(name, path)
    return Extractor(
        name=name,
        sha256=digest,
        dim=network.dim,
        module=network.module.to(device),
        device=device,
        takes_colour=True,
        resizing=f"bilinear as TensorFlow 1 to {network.side}x{network.side}, no antialiasing (torch-fidelity's)",
        file=ExtractorFile(path=path, maker=name, label=digest),
    )


def inception_weights(otherwise: str = "") -> tuple[Path, str]:
    """The weights file in torch's hub folder, which is downloaded if it is missing, and its SHA-256.

    otherwise: an alternative remedy for the error. Raises RequestError if the download fails, FileFormatError if the file is
    corrupt.
    """
    import torch

    url: str = fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    name = url.rsplit("/", 1)[1]
    start = Path(name).stem.rsplit("-", 1)[1]  # the file's name ends in the first digits of its SHA-256
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        remedy = f"put {name} from {url} into {path.parent}{otherwise}"
        download(url, path, lambda content: _starts(content, start), "InceptionV3 weights", remedy)
    digest = sha256(path)
    if not digest.startswith(start):
        raise FileFormatError(f"{path} is corrupt: its SHA-256 is {digest[:8]}...", remedy=f"get it again from {url}")
    return path, digest


def _rebatched(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Regroup the images in batches of _BATCH, because the last bits of features depend on the batch size."""
    waiting: list[np.ndarray] = []
    for images in batches:
        waiting.append(images)
        if sum(map(len, waiting)) >= _BATCH:
            gathered = np.concatenate(waiting)
            whole = len(gathered) - len(gathered) % _BATCH
            yield from np.split(gathered[:whole], whole // _BATCH)
            waiting = [gathered[whole:]]
    rest = np.concatenate(waiting) if waiting else np.empty(0)
    if len(rest):
        yield rest


def _starts(content: bytes, digest: str) -> bool:
    return hashlib.sha256(content).hexdigest().startswith(digest)
