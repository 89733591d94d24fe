"""The structure of the JSON file that `evaluate --json` writes, and `compare` and `publish` read."""

from typing import NotRequired, TypedDict


class ReferenceFacts(TypedDict):
    """The reference data set. samples: its number of images."""

    name: str
    samples: int


class ExtractorFacts(TypedDict):
    """The extractor of the features. heldout_accuracy: of a trained classifier, None for other extractors."""

    name: str
    sha256: str
    heldout_accuracy: float | None
    resizing: str | None


class RoleScores(TypedDict):
    """One role's scores by metric.

    engine, weights_sha256, steps (of a teacher's sampler, else 1): None for images that were made elsewhere. Results of earlier
    versions have no steps. samples: the number of images in a set.
    values: means over the sets of seeds. spread, by_set, least: only present if there are several sets.
    """

    source: str
    engine: str | None
    weights_sha256: str | None
    steps: NotRequired[int | None]
    samples: int
    values: dict[str, float]
    spread: NotRequired[dict[str, float]]
    by_set: NotRequired[list[dict[str, float]]]
    least: NotRequired[dict[str, float]]


class EvaluationResult(TypedDict):
    """The whole result. The roles in `scores` are generator and teacher, or images; for images, seeds and classes are None."""

    reference: ReferenceFacts
    extractor: ExtractorFacts
    seeds: str | None
    sets: int
    classes: str | None
    scores: dict[str, RoleScores]
    distance_to_teacher_ratio: float | None
    notes: list[str]
    versions: dict[str, str]
