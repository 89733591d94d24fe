"""A small classifier that is trained on a data set, to score images for which InceptionV3's features say little.

There is one fixed recipe. The same data makes the same weights on the same machine, and slightly different weights on another.
The classifiers for the shipped generators' data ship too (uni_instruct/classifiers), so that their distances are the same
on all machines. All others are cached by the hash of the data.
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
from uni_instruct.spec import ImageShape
from uni_instruct.system.files import atomic_file, disk_errors, locked
from uni_instruct.system.progress import ProgressFactory, silent

SEED = 20505
BATCH = 64
STEPS, MAX_STEPS, EPOCHS = 1000, 3000, 3  # train for EPOCHS, but at least STEPS and at most MAX_STEPS steps
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 1e-2, 0.05
WIDTH = 24
MAX_SIDE = 32  # larger images are downsampled to this by averaging
SHIFT = 1 / 16  # augmentation: every other image of a batch is shifted by up to this part of its side, in any direction
HOLD_OUT_EVERY = 10
MIN_IMAGES, MAX_PROBE = 50, 10_000
_log = logging.getLogger(__name__)


class Classifier(nn.Module):
    """Four convolutions and two linear layers. The input of the last layer, of size FEATURES, is used as features.

    `scale` scales the features of the training data to a mean variance of 1, so that Frechet distances have a common unit.
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
        if x.shape[2:] != self.size:  # pooling to the same size would only copy
            x = F.adaptive_avg_pool2d(x, self.size)
        for convs in (self.convs1, self.convs2):
            for conv in convs:
                x = F.silu(conv(x), inplace=not torch.is_grad_enabled())  # in place, because memory limits the speed
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        hidden = F.silu(self.hidden(x.flatten(1)))
        return hidden * self.scale, self.out(hidden)


class ClassifierFeatures(nn.Module):
    """The classifier as evaluations call it, on bytes and in the memory layout that is fast on a CPU."""

    def __init__(self, classifier: Classifier, channels: int):
        super().__init__()
        self.classifier, self.channels = classifier, channels
        # On a CPU channels_last takes two thirds of the time of the default layout.
        for parameter in classifier.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, FEATURES], logits [B, K]) of images uint8 [B, C, H, W]."""
        # torch-fidelity reads every file as RGB. A grey image's channels are equal there, and the first one is enough.
        pixels = (images[:, : self.channels] / 127.5 - 1).to(memory_format=torch.channels_last)
        features, logits = self.classifier(pixels)
        return features, logits


def open_features(path: Path) -> ClassifierFeatures:
    """The classifier in that file, for evaluation. Raises FileFormatError if the file is corrupt or not a classifier's."""
    classifier, info = load_classifier(path)
    return ClassifierFeatures(classifier, info.image_shape[0])


def trained_classifier(dataset: Dataset, with_progress: ProgressFactory = silent) -> Path:
    """The file of the data set's classifier: the shipped one, or the cached one, which is trained now if it is missing.

    Raises RequestError if the data has fewer than 2 classes or too few images, or if the cache cannot be written.
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
    # Before the training, which would be wasted if its result could not be written.
    with _cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    # Trainings that are started together need the same classifier: the first process makes it, the others wait for it.
    with locked(
        lock, lambda: _log.warning("waiting for another process, which is training the classifier of '%s'", dataset.name)
    ):
        try:
            if not _is_whole(path):
                _train_into(path, dataset, fingerprint, with_progress)
        finally:
            lock.unlink(missing_ok=True)
    return path


def _is_whole(path: Path) -> bool:
    """Whether there is a valid classifier at this path."""
    if not path.is_file():
        return False
    try:
        load_classifier(path)
    except FileFormatError as error:
        _log.warning("training again: %s", error)
        return False
    return True


def _train_into(path: Path, dataset: Dataset, fingerprint: str, with_progress: ProgressFactory) -> None:
    # One thread, because rounding depends on the number of threads. So small a network gains nothing from more.
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
    """The classifier in evaluation mode, and its metadata. Raises FileFormatError if the file is invalid."""
    weights, info = read_classifier(path)
    try:
        model = _blank(info.image_shape, info.num_classes)
        model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        raise not_a_classifier(path, error) from error
    return model.eval(), info


def train_classifier(dataset: Dataset, with_progress: ProgressFactory = silent) -> tuple[Classifier, float]:
    """Train the classifier on nine tenths of the data. Returns it and its accuracy on the other tenth.

    It runs on the CPU, and all random numbers come from SEED. Images are read when they are needed.
    """
    indices = torch.arange(len(dataset))
    held_out = indices % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    training, probe = indices[~held_out], _evenly_spaced(indices[held_out])
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
    features, _ = _outputs(model, dataset, _evenly_spaced(training))
    # scale = (mean over features of their variance)^(-1/2), so that the distances of two data sets have the same unit.
    model.scale.fill_(1 / features.double().var(dim=0).mean().clamp(min=1e-12).sqrt())
    _, logits = _outputs(model, dataset, probe)
    return model.eval(), (logits.argmax(1) == _labels(dataset, probe)).double().mean().item()


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def _blank(image_shape: ImageShape, num_classes: int) -> Classifier:
    """A classifier whose weights the caller sets. torch's global random state is preserved."""
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


# At progress t: t / 0.1 up to 0.1, then (1 + cos(pi (t - 0.1) / 0.9)) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983).
def _schedule(done: float) -> float:
    """The factor of the learning rate: linear warm-up over the first tenth, then cosine decay to zero."""
    return done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def _shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Shift every other image by up to SHIFT of its side, with interpolation. The others stay sharp."""
    # Times 2, because affine_grid measures in half sides: [-1, 1] is the whole image.
    offsets = (torch.rand(len(images), 2, generator=rng) * 2 - 1) * 2 * SHIFT
    offsets[::2] = 0
    affine = torch.cat([torch.eye(2).expand(len(images), 2, 2), offsets[:, :, None]], dim=2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _images(dataset: Dataset, indices: Tensor) -> Tensor:
    return torch.from_numpy(dataset.images(indices.numpy())).permute(0, 3, 1, 2) / 127.5 - 1


def _labels(dataset: Dataset, indices: Tensor) -> Tensor:
    assert dataset.labels is not None  # `trained_classifier` has checked that there are classes
    return torch.from_numpy(dataset.labels[indices.numpy()])


@torch.no_grad()
def _outputs(model: Classifier, dataset: Dataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    parts = [model(_images(dataset, part)) for part in indices.split(256)]
    return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])


def _evenly_spaced(indices: Tensor) -> Tensor:
    """At most MAX_PROBE of the indices, evenly spaced."""
    return indices[:: math.ceil(len(indices) / MAX_PROBE)]


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    """Raise DiskErrors as RequestErrors, whose remedy is to choose another cache folder."""
    try:
        with disk_errors(path):
            yield
    except DiskError as error:
        remedy = "set XDG_CACHE_HOME to a writable folder with free space"
        raise RequestError(error.problem, remedy=remedy, param="extractor") from error
