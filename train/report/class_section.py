"""The report's section on classes: how often samples are classified as their class, their variety, and examples."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uni_instruct.data import Dataset
from uni_instruct.evaluate import Evaluator
from uni_instruct.evaluate.sample_source import reference_class_ids
from uni_instruct.generate import generate_images
from uni_instruct.images import contact_sheet, encode
from uni_instruct.system.files import atomic_file
from uni_instruct.train.report.inputs import ReportInputs
from uni_instruct.train.report.markdown import picture, table, text
from uni_instruct.train.report.pictures import columns_of_two

SAMPLES, SHOWN = 64, 8  # images of each class: number that is scored, and number that is shown, beside as many training images
MAX_SHOWN_CLASSES = 20  # a longer table would not be readable


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The scores of one class; None if not measured.

    recognised, recognised_data: share of samples and of training images that the classifier assigns to the class.
    varied: mean distance of two samples in the features / mean distance of two training images.
    """

    name: str
    recognised: float | None
    recognised_data: float | None
    varied: float | None


def class_section(inputs: ReportInputs) -> list[str]:
    """A table of the classes and a picture with a row for each. Empty if generator or data have no classes."""
    dataset, spec = inputs.plan.dataset, inputs.spec
    if not spec.num_classes or dataset is None or dataset.labels is None or not inputs.makes_pictures:
        return []
    names = tuple(spec.class_name(i) for i in range(spec.num_classes))
    ids, note = reference_class_ids(np.arange(spec.num_classes), names, dataset)
    if ids is None:
        return [f"Not compared: {text(note or 'the classes are not those of the data')}."]
    shown = range(min(spec.num_classes, MAX_SHOWN_CLASSES))
    scores, left, right = [], [], []
    for class_id in shown:
        samples = generate_images(inputs.student_engine, range(SAMPLES), [class_id] * SAMPLES)
        data = _training_images(dataset, int(ids[class_id]))
        scores.append(_score(inputs.evaluator, names[class_id], int(ids[class_id]), samples, data))
        left.append(data[:SHOWN])
        right.append(samples[:SHOWN])
    rows = [contact_sheet(_filled(images), SHOWN) for images in left], [contact_sheet(images, SHOWN) for images in right]
    with atomic_file(inputs.pictures / "classes.png") as partial:
        partial.write_bytes(encode(columns_of_two(*rows)))
    inputs.facts["classes"] = [vars(score) for score in scores]
    more = f" The first {len(shown)} of {spec.num_classes} classes." if len(shown) < spec.num_classes else ""
    return [
        *_table(scores),
        "",
        f"Of {SAMPLES} samples a class, seeds 0 to {SAMPLES - 1}, and as many training images.{more} Variety: the mean "
        "distance of two samples in the features used for scores, divided by that of two training images. 1: as varied as "
        "the data.",
        "",
        "A row for each class: training images on the left, samples on the right.",
        "",
        picture("classes.png", "a row for each class: training images, and samples"),
    ]


def variety(features: Tensor) -> float:
    """The mean Euclidean distance of two different rows of features [N, D]; 0 for a single row."""
    # sum_ij |f_i - f_j| / (N (N - 1)): the diagonal adds 0.
    count = len(features)
    distances = torch.cdist(features, features)
    return (distances.sum() / max(1, count * (count - 1))).item()


def _training_images(dataset: Dataset, class_id: int) -> np.ndarray:
    assert dataset.labels is not None
    (found,) = np.nonzero(dataset.labels == class_id)
    chosen = found[np.arange(min(SAMPLES, len(found))) * len(found) // max(1, min(SAMPLES, len(found)))]
    return dataset.images(chosen)


def _score(evaluator: Evaluator | None, name: str, class_id: int, samples: np.ndarray, data: np.ndarray) -> ClassScore:
    if evaluator is None or not len(data):
        return ClassScore(name=name, recognised=None, recognised_data=None, varied=None)
    made, real = evaluator.extractor([samples]), evaluator.extractor([data])
    data_variety = variety(real.features)
    knows = evaluator.extractor.num_classes > 0
    return ClassScore(
        name=name,
        recognised=_share(made.logits, class_id) if knows else None,
        recognised_data=_share(real.logits, class_id) if knows else None,
        varied=variety(made.features) / data_variety if data_variety else None,
    )


def _share(logits: Tensor, class_id: int) -> float:
    return (logits.argmax(dim=1) == class_id).double().mean().item()


def _table(scores: list[ClassScore]) -> list[str]:
    rows = [
        (text(score.name), _percent(score.recognised), _percent(score.recognised_data), _ratio(score.varied))
        for score in scores
    ]
    return table(("class", "recognised", "training images recognised", "variety"), rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _filled(images: np.ndarray) -> np.ndarray:
    """A row's images, filled up to SHOWN with white ones if the class has fewer."""
    missing = SHOWN - len(images)
    return np.concatenate([images, np.full((missing, *images.shape[1:]), 255, np.uint8)]) if missing else images
