"""A small classifier, trained on a data set to judge images of its kind: where InceptionV3 says little.

The recipe is one and fixed: the same data gives the same weights on the same machine, and slightly other ones elsewhere. For
generators that ship the classifiers of their data do so too (uni_instruct/classifiers), which makes their distances the same
everywhere. All others are cached by the data's hash.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.data import Dataset
from uni_instruct.engines.hardware.threads import one_torch_thread
from uni_instruct.errors import DiskError, FileFormatError, RequestError
from uni_instruct.evaluate.classifier_file import (
    FEATURES,
    METADATA,
    RECIPE,
    ClassifierInfo,
    cached_classifier,
    not_a_classifier,
    read_classifier,
    shipped_classifier,
)
from uni_instruct.files import atomic_file, disk_errors, locked
from uni_instruct.progress import ProgressFactory, silent
from uni_instruct.spec import ImageShape

SEED = 20505
BATCH = 64
STEPS, MAX_STEPS, EPOCHS = 1000, 3000, 3  # at least STEPS, more for large data sets, at most MAX_STEPS
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 1e-2, 0.05
WIDTH = 24
MAX_SIDE = 32  # larger images are averaged down to this
SHIFT = 1 / 16  # of the image's side, either way, for every other image of a batch
HOLD_OUT_EVERY = 10
MIN_IMAGES, MAX_PROBE = 50, 10_000
_log = logging.getLogger(__name__)


class Classifier(nn.Module):
    """Four convolutions and two linear layers; FEATURES are read before the last.

    `scale` brings the features of the training data to a mean variance of 1, so that a Frechet distance has a unit.
    """

    scale: Tensor

    def __init__(self, image_shape: ImageShape, num_classes: int):
        super().__init__()
        channels, *sides = image_shape
        self.size = (min(sides[0], MAX_SIDE), min(sides[1], MAX_SIDE))
        height, width = (math.ceil(side / 4) for side in self.size)
        self.convs1 = nn.ModuleList([_conv(channels, WIDTH), _conv(WIDTH, WIDTH)])
        self.convs2 = nn.ModuleList([_conv(WIDTH, 2 * WIDTH), _conv(2 * WIDTH, 2 * WIDTH)])
        self.hidden = nn.Linear(2 * WIDTH * height * width, FEATURES)
        self.out = nn.Linear(FEATURES, num_classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, FEATURES], logits [B, K]) of float [B, C, H, W] in [-1, 1]."""
        if x.shape[2:] != self.size:  # to the same size it is a copy
            x = F.adaptive_avg_pool2d(x, self.size)
        for convs in (self.convs1, self.convs2):
            for conv in convs:
                x = F.silu(conv(x), inplace=not torch.is_grad_enabled())  # memory is what takes the time
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        hidden = F.silu(self.hidden(x.flatten(1)))
        return hidden * self.scale, self.out(hidden)


class ClassifierFeatures(nn.Module):
    """What an evaluation asks of a classifier, fast on a CPU."""

    def __init__(self, classifier: Classifier, channels: int):
        super().__init__()
        self.classifier, self.channels = classifier, channels
        # On a CPU channels that lie last take two thirds of the time of channels that lie first.
        for parameter in classifier.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, FEATURES], logits [B, K]) of images uint8 [B, C, H, W]."""
        # torch-fidelity reads every file as RGB; a grey image's channels are equal, and the first is the image.
        pixels = (images[:, : self.channels] / 127.5 - 1).to(memory_format=torch.channels_last)
        features, logits = self.classifier(pixels)
        return features, logits


def open_features(path: Path) -> ClassifierFeatures:
    """Those of the classifier in that file. Raises FileFormatError where it is none or corrupt."""
    classifier, info = load_classifier(path)
    return ClassifierFeatures(classifier, info.image_shape[0])


def trained_classifier(dataset: Dataset, with_progress: ProgressFactory = silent) -> Path:
    """The file of the data set's classifier: the one that ships, else the cache's, which is trained now if it is not there.

    Raises RequestError where the data has no classes or too few images, or the cache cannot be written.
    """
    if dataset.num_classes < 2 or len(dataset) < MIN_IMAGES:
        raise RequestError(
            f"data set '{dataset.name}' has {dataset.num_classes} classes and {len(dataset)} images, too few for a classifier",
            remedy=f"give at least 2 classes and {MIN_IMAGES} images, or use --extractor inception",
            param="extractor",
        )
    fingerprint = dataset.fingerprint()
    if shipped := shipped_classifier(fingerprint):
        return shipped
    path = cached_classifier(fingerprint)
    if _is_whole(path):
        return path
    lock = path.with_name(f".{path.name}.lock")
    # Before the training, which would be in vain if its result could not be written.
    with _cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    # Trainings that are started together want the same classifier: the first makes it, the others wait.
    with locked(lock, lambda: _log.warning("waiting for the classifier of '%s', which another training makes", dataset.name)):
        try:
            if not _is_whole(path):
                _train_into(path, dataset, fingerprint, with_progress)
        finally:
            lock.unlink(missing_ok=True)
    return path


def _is_whole(path: Path) -> bool:
    """Whether a classifier can be read there."""
    if not path.is_file():
        return False
    try:
        load_classifier(path)
    except FileFormatError as error:
        _log.warning("training again: %s", error)
        return False
    return True


def _train_into(path: Path, dataset: Dataset, fingerprint: str, with_progress: ProgressFactory) -> None:
    # The order in which sums are rounded depends on the number of threads, and so small a network gains nothing from more.
    with one_torch_thread():
        model, heldout_accuracy = train_classifier(dataset, with_progress)
    info = ClassifierInfo(
        recipe=RECIPE,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        heldout_accuracy=heldout_accuracy,
        fingerprint=fingerprint,
    )
    content = save(model.state_dict(), metadata={METADATA: json.dumps(asdict(info))})
    with _cache_errors(path), atomic_file(path) as partial:
        partial.write_bytes(content)


def load_classifier(path: Path) -> tuple[Classifier, ClassifierInfo]:
    """A classifier in evaluation mode. Raises FileFormatError for a file that is no such classifier or corrupt."""
    weights, info = read_classifier(path)
    try:
        model = _blank(info.image_shape, info.num_classes)
        model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        raise not_a_classifier(path, error) from error
    return model.eval(), info


def train_classifier(dataset: Dataset, with_progress: ProgressFactory = silent) -> tuple[Classifier, float]:
    """Trains the classifier on nine tenths of the data; also returns its accuracy on the other tenth.

    On the CPU, all randomness from SEED. Images are read as they are needed.
    """
    indices = torch.arange(len(dataset))
    held_out = indices % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    training, probe = indices[~held_out], _spread(indices[held_out])
    rng = torch.Generator().manual_seed(SEED)
    model = _initialised(_blank(dataset.image_shape, dataset.num_classes), rng)
    steps = min(MAX_STEPS, max(STEPS, EPOCHS * len(training) // BATCH))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    with torch.enable_grad(), with_progress(f"train {dataset.name}-classifier", steps, "steps") as progress:
        for step in range(steps):
            chosen = training[torch.randint(len(training), (BATCH,), generator=rng)]
            _, logits = model(_shifted(_images(dataset, chosen), rng))
            loss = F.cross_entropy(logits, _labels(dataset, chosen), label_smoothing=LABEL_SMOOTHING)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * _schedule(step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.advance(1, f"loss {loss.item():.3f}")
    features, _ = _outputs(model, dataset, _spread(training))
    # Features times s, s = (mean over features of their variance)^(-1/2): distances of two data sets have the same unit.
    model.scale.fill_(1 / features.double().var(dim=0).mean().clamp(min=1e-12).sqrt())
    _, logits = _outputs(model, dataset, probe)
    return model.eval(), (logits.argmax(1) == _labels(dataset, probe)).double().mean().item()


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def _blank(image_shape: ImageShape, num_classes: int) -> Classifier:
    """A classifier whose weights are still to be set; torch's global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return Classifier(image_shape, num_classes)


@torch.no_grad()
def _initialised(model: Classifier, rng: torch.Generator) -> Classifier:
    """Normal weights of variance 2 / fan-in (He et al. 2015, arXiv 1502.01852), zero biases."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel()
        weight = torch.randn(parameter.shape, generator=rng) * math.sqrt(2 / fan_in)
        parameter.copy_(weight if parameter.ndim > 1 else torch.zeros_like(parameter))
    return model


# Rate at progress t: t / 0.1 up to 0.1, then (1 + cos(pi (t - 0.1) / 0.9)) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983).
def _schedule(done: float) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero."""
    return done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def _shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Every other image moved by up to SHIFT of its side, by interpolation; the rest stay sharp."""
    # affine_grid measures in half sides: [-1, 1] is the whole image.
    offsets = (torch.rand(len(images), 2, generator=rng) * 2 - 1) * 2 * SHIFT
    offsets[::2] = 0
    affine = torch.cat([torch.eye(2).expand(len(images), 2, 2), offsets[:, :, None]], dim=2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _images(dataset: Dataset, indices: Tensor) -> Tensor:
    return torch.from_numpy(dataset.images(indices.numpy())).permute(0, 3, 1, 2) / 127.5 - 1


def _labels(dataset: Dataset, indices: Tensor) -> Tensor:
    assert dataset.labels is not None  # it has classes
    return torch.from_numpy(dataset.labels[indices.numpy()])


@torch.no_grad()
def _outputs(model: Classifier, dataset: Dataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    parts = [model(_images(dataset, part)) for part in indices.split(256)]
    return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])


def _spread(indices: Tensor) -> Tensor:
    """At most MAX_PROBE of them, evenly spaced."""
    return indices[:: math.ceil(len(indices) / MAX_PROBE)]


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    """Within the block, a cache that cannot be written is a RequestError that says how to choose another."""
    try:
        with disk_errors(path):
            yield
    except DiskError as error:
        remedy = "set XDG_CACHE_HOME to a folder with space that can be written"
        raise RequestError(error.problem, remedy=remedy, param="extractor") from error
