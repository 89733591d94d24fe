"""The structure of the JSON file that `evaluate --json` writes, and `compare` and `publish` read."""

from collections.abc import Mapping
from typing import NotRequired, TypedDict, cast


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


def parse_result(facts: object) -> EvaluationResult:
    """Check parsed JSON, as far as it is read later. Raises ValueError unless it is the result of a generator.

    Results of earlier versions lack some of the keys; values may be inf or nan, as some metrics of few images are.
    """
    found = _mapping(facts)
    scores, reference, extractor = (_mapping(found.get(key) or {}) for key in ("scores", "reference", "extractor"))
    if "generator" not in scores:
        raise ValueError("no generator was scored")
    for role in scores.values():
        _check_role(_mapping(role))
    _check(reference, "name", str)
    _check(extractor, "name", str)
    _check(extractor, "sha256", str)
    _check(found, "seeds", str)
    _check(found, "classes", str)
    if not isinstance(found.get("sets", 1), int):
        raise ValueError("sets is not a whole number")
    return cast(EvaluationResult, found)


def _check_role(role: Mapping[str, object]) -> None:
    values = _numbers(role.get("values"))
    by_set = role.get("by_set", [values])
    if not isinstance(by_set, list) or not by_set:
        raise ValueError("its sets of seeds are not a list")
    for part in (*by_set, role.get("spread", values)):
        if _numbers(part).keys() != values.keys():
            raise ValueError("its sets of seeds have different metrics")
    for key in ("source", "engine", "weights_sha256"):
        _check(role, key, str)


def _numbers(part: object) -> Mapping[str, object]:
    values = _mapping(part)
    for name, value in values.items():
        # Within what a mean of many can hold; a comparison with nan and inf is false, and lets both through.
        if isinstance(value, bool) or not isinstance(value, int | float) or (abs(value) > 1e100 and value * 0 == 0):
            raise ValueError(f"{str(name)[:40]} is not a number")
    if not values:
        raise ValueError("nothing was measured")
    return values


def _mapping(part: object) -> Mapping[str, object]:
    if not isinstance(part, dict):
        raise ValueError("it is not a result")
    return part


def _check(part: Mapping[str, object], key: str, kind: type) -> None:
    if part.get(key) is not None and not isinstance(part[key], kind):
        raise ValueError(f"{key} is not of type {kind.__name__}")
