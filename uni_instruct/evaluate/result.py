"""What `evaluate --json` writes, and `compare` and `publish` read."""

from typing import NotRequired, TypedDict


class ReferenceFacts(TypedDict):
    """The data set that was scored against; samples is how many images it has."""

    name: str
    samples: int


class ExtractorFacts(TypedDict):
    """What made the features; heldout_accuracy is a classifier's, None for InceptionV3."""

    name: str
    sha256: str
    heldout_accuracy: float | None
    resizing: str | None


class RoleScores(TypedDict):
    """One role's scores by metric: values are means over the sets of seeds. The last three are there for several sets alone.

    engine, weights_sha256 and steps (of a teacher's sampler, else 1) are None for images that were made elsewhere; results of
    earlier versions have no steps. samples is the size of a set.
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
    """The whole result. scores has the roles generator and teacher, or images; seeds and classes are None for the last."""

    reference: ReferenceFacts
    extractor: ExtractorFacts
    seeds: str | None
    sets: int
    classes: str | None
    scores: dict[str, RoleScores]
    distance_to_teacher_ratio: float | None
    notes: list[str]
    versions: dict[str, str]
