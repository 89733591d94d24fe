"""What turns images into the features that are compared: InceptionV3, or a classifier that is trained on the reference."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uni_instruct.data import Dataset
from uni_instruct.download import download
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate.classifier_file import FEATURES, classifier_path, read_classifier, weights_sha256
from uni_instruct.evaluate.fidelity import create_extractor, fidelity
from uni_instruct.files import sha256
from uni_instruct.float32 import full_float32
from uni_instruct.images import checked_images
from uni_instruct.progress import ProgressFactory, silent
from uni_instruct.spec import ImageShape

if TYPE_CHECKING:
    import torch

# What training and evaluation choose from; evaluation also has networks whose weights the user brings (pretrained.py).
EXTRACTORS = ("auto", "inception", "classifier")
PRETRAINED = (
    *("clip-vit-b-32", "clip-vit-b-16", "clip-vit-l-14", "clip-vit-l-14-336px"),
    *("dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14"),
)
INCEPTION = "inception-v3"
INCEPTION_REGISTERED = "inception-v3-compat"
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
    """What a worker opens an extractor from: its weights, who reads them ('inception', 'classifier' or one of PRETRAINED), and
    their SHA-256, or of a classifier its name.
    """

    path: Path
    maker: str
    label: str

    def open(self) -> "Extractor":
        """The extractor. Raises FileFormatError where the file is corrupt."""
        if self.maker in PRETRAINED:
            return open_pretrained(self.maker, self.path, self.label)
        return open_inception(self.path, self.label) if self.maker == "inception" else open_classifier(self.path, self.label)


class WhenCalled:
    """A network that is loaded when it is first called: who leaves the work to others needs neither it nor torch."""

    def __init__(self, load: "Callable[[], torch.nn.Module]"):
        self._load = load

    @cached_property
    def network(self) -> "torch.nn.Module":
        """The network."""
        return self._load()

    def __call__(self, pixels: "torch.Tensor") -> "Sequence[torch.Tensor]":
        """What it gives."""
        found: Sequence[torch.Tensor] = self.network(pixels)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Extractor:
    """A network that gives (features, logits) of images uint8 [B, C, H, W], ready to run.

    image_shape is [C, H, W] where it takes only such images, else None. num_classes is the reference's, 0 where the logits are
    of other classes. heldout_accuracy is a trained classifier's, on images it has not seen. takes_colour: grey images are
    shown to it as colour; resizing says how it enlarges images, as other tools do it in other ways.
    """

    name: str
    sha256: str
    dim: int
    module: "torch.nn.Module | WhenCalled"
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
        """Whether the field's names (FID, KID, IS) are right for what it measures."""
        return self.name == INCEPTION

    def required_file(self) -> ExtractorFile:
        """What a worker opens it from. Raises RequestError for one that is in this process alone."""
        if self.file is None:
            raise RequestError(f"extractor {self.name} is in no file", remedy="score without workers", param="extractor")
        return self.file

    def __call__(self, batches: Iterable[np.ndarray]) -> Features:
        """Features of images uint8 [B, H, W, C], the same whatever their batches and memory layout.

        Raises RequestError where there are no images, or floats in place of pixels.
        """
        import torch

        features, logits = [], []
        for images in _rebatched(map(checked_images, batches)):
            # Contiguous: the last bits of a convolution depend on the memory layout.
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format).to(self.device)
            if self.takes_colour and pixels.shape[1] == 1:
                pixels = pixels.expand(-1, 3, -1, -1)
            # Published FIDs are of float32; with TF32, cuDNN's default, a GPU gives other features than a CPU.
            with torch.inference_mode(), full_float32():
                first, second = self.module(pixels)
            features.append(first.cpu())
            logits.append(second.cpu())
        if not features:
            raise RequestError("there are no images to score", remedy="give at least one", param="images")
        # Cloned outside inference mode: torch-fidelity's metrics compute with what would be inference tensors.
        with torch.inference_mode(False):
            return Features(torch.cat(features).clone(), torch.cat(logits).clone())


def choose_extractor(name: str, dataset: Dataset, with_progress: ProgressFactory = silent) -> Extractor:
    """The extractor of that name (EXTRACTORS, PRETRAINED) for a reference.

    auto: InceptionV3 for colour images from 32 pixels on, or where there are no classes; else the classifier.
    Raises RequestError for an unknown name, or where InceptionV3's weights cannot be had.
    """
    if name in PRETRAINED:
        return pretrained(name)
    if name not in EXTRACTORS:
        raise RequestError(f"extractor '{name}' is unknown", remedy=f"choose one of {', '.join(EXTRACTORS)}", param="extractor")
    if name == "auto":
        # InceptionV3 has seen colour photographs, enlarged to 299 pixels: of smaller or grey images its features say little.
        channels, *sides = dataset.image_shape
        suits = channels == 3 and min(sides) >= INCEPTION_MIN_SIDE
        name = "inception" if suits or dataset.num_classes < 2 else "classifier"
    return inception(has_classes=dataset.num_classes > 1) if name == "inception" else classifier(dataset, with_progress)


def classifier(dataset: Dataset, with_progress: ProgressFactory = silent) -> Extractor:
    """The data set's own classifier, shipped, from the cache or trained now; it is always named after the data set."""
    path = classifier_path(dataset.fingerprint())
    try:
        read_classifier(path)  # one that is there is read without torch
    except FileFormatError:
        from uni_instruct.evaluate.classifier import trained_classifier

        path = trained_classifier(dataset, with_progress)
    return open_classifier(path, f"{dataset.name}-classifier")


def open_classifier(path: Path, name: str) -> Extractor:
    """A classifier from its file. Raises FileFormatError where it is corrupt."""
    weights, info = read_classifier(path)

    def network() -> "torch.nn.Module":
        from uni_instruct.evaluate.classifier import open_features

        return open_features(path)

    return Extractor(
        name=name,
        sha256=weights_sha256(weights),
        dim=FEATURES,
        module=WhenCalled(network),
        image_shape=info.image_shape,
        num_classes=info.num_classes,
        heldout_accuracy=info.heldout_accuracy,
        fingerprint=info.fingerprint,
        file=ExtractorFile(path=path, maker="classifier", label=name),
    )


def inception(has_classes: bool = False) -> Extractor:
    """InceptionV3 with the weights that FID is defined by. has_classes: whether its error may offer the classifier instead.

    Raises RequestError where the weights are neither on this machine nor can be downloaded.
    """
    return open_inception(*inception_weights(", or use --extractor classifier" if has_classes else ""))


def open_inception(path: Path, digest: str) -> Extractor:
    """InceptionV3 from a file with that SHA-256, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # It draws weights before it loads them; the caller's random state stays as it was.
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
    """CLIP's or DINOv2's, by a name from PRETRAINED; path: of its weights, else where torch and CLIP keep theirs.

    Raises RequestError, in a line that says which file to put where, when they are not there; FileFormatError where a file is
    another.
    """
    from uni_instruct.evaluate.pretrained import find_weights

    return open_pretrained(name, *find_weights(name, path))


def open_pretrained(name: str, path: Path, digest: str) -> Extractor:
    """CLIP or DINOv2 from a file with that SHA-256, on a GPU where there is one. Raises FileFormatError for another file."""
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
    """The weights' file in torch's hub folder, downloaded where it is missing, and its SHA-256.

    otherwise: what else the user may do, for the error. Raises RequestError where the file cannot be had, FileFormatError where
    it is corrupt.
    """
    import torch

    url: str = fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    name = url.rsplit("/", 1)[1]
    start = Path(name).stem.rsplit("-", 1)[1]  # the name ends in the first digits of the SHA-256
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        remedy = f"put {name} from {url} into {path.parent}{otherwise}"
        download(url, path, lambda content: _starts(content, start), "InceptionV3 weights", remedy)
    digest = sha256(path)
    if not digest.startswith(start):
        raise FileFormatError(f"{path} is corrupt: its SHA-256 is {digest[:8]}...", remedy=f"get it again from {url}")
    return path, digest


def _rebatched(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same images in batches of _BATCH: the last bits of features depend on the size of the batch."""
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
