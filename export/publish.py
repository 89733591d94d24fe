"""A trained generator made ready to ship: weights in half precision where nobody sees it, engine, samples and model card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np

from uni_instruct.bundle import CARD, CONFIG, SAMPLES, Bundle
from uni_instruct.engine import Engine, open_engine
from uni_instruct.engines.record import EngineId, EngineRecord
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate.result import EvaluationResult, parse_result
from uni_instruct.export.card import Rounding, published_card, teacher_weights
from uni_instruct.export.checked_images import checked_classes, checked_images
from uni_instruct.export.half_precision import half_precision_changes, rounding_of, too_large, without_half
from uni_instruct.export.targets import TARGETS, check_exportable, export_engine
from uni_instruct.files import JSON_ERRORS, atomic_file, atomic_folder, refuse_file_name
from uni_instruct.generate import by_class, generate_batches, resolve_class_ids
from uni_instruct.images import contact_sheet, encode
from uni_instruct.progress import ProgressFactory, silent
from uni_instruct.spec import ModelSpec

# The engine that ships: the one that runs everywhere.
ENGINE = "onnx-fp32"
# Images of a teacher at most, which takes dozens of network evaluations for each.
TEACHER_IMAGES = 64
# The sheet: so many images of each class, of so many classes.
SHEET_COLUMNS, SHEET_ROWS = 16, 16
# A line of progress for so many.
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What was published where, and how large all of it is. A teacher has no engine."""

    path: str
    name: str
    rounding: Rounding
    engine: EngineRecord | None
    file_bytes: Mapping[str, int]


def publish(source: str | Path, out: Path, scores: Sequence[Path] = (), shows: ProgressFactory = silent) -> Publication:
    """Publishes the generator of a run, or a bundle, to the folder `out`, whole or not at all.

    Of a teacher, to distil from, it stores half precision whatever that changes, where that holds its weights, keeps its card
    and says there what changed. scores: what `evaluate --json` printed, for a generator's card. shows: told of each part that
    takes long. Raises RequestError for a generator of latents, for an `out` that holds anything but an earlier publication of
    the same weights, and for scores of other weights; MissingExtraError, ParityError and DiskError as `export_engine` does.
    """
    original = open_generator(source)
    if original.spec.steps > 1:
        return _publish_teacher(original, out, scores, shows)
    check_exportable(original)
    TARGETS[ENGINE].check_packages()
    _check_replaceable(out, original)
    read = [read_scores(path) for path in scores]
    with atomic_folder(out) as folder:
        bundle, rounding = store(original, folder, shows)
        check_scores(read, original, bundle)
        record = export_engine(bundle, ENGINE, shows=shows)
        command, sheet = sample_sheet(bundle, shows)
        (folder / SAMPLES).write_bytes(encode(sheet))
        card = published_card(bundle, rounding, record, read, command)
        (folder / CARD).write_text(card)
    return Publication(path=str(out), name=original.spec.name, rounding=rounding, engine=record, file_bytes=_sizes(out))


def _publish_teacher(original: Bundle, out: Path, scores: Sequence[Path], shows: ProgressFactory) -> Publication:
    if scores:
        problem = f"{original.path} is a teacher: its card keeps the scores that its training measured"
        raise RequestError(problem, remedy="leave --scores out", param="scores")
    _check_replaceable(out, original)
    samples, weights = original.path / SAMPLES, original.weights()
    with atomic_folder(out) as folder:
        sheet = samples.read_bytes() if samples.exists() else None
        name = too_large(weights)
        stored = Bundle.write(folder, _published_spec(original, {}), weights, "", sheet, precision="fp32" if name else "fp16")
        rounding = without_half(name) if name else _teacher_rounding(original, stored, shows)
        (folder / CARD).write_text((original.path / CARD).read_text() + "\n" + teacher_weights(rounding))
    return Publication(path=str(out), name=original.spec.name, rounding=rounding, engine=None, file_bytes=_sizes(out))


def _teacher_rounding(original: Bundle, half: Bundle, shows: ProgressFactory) -> Rounding:
    seeds = range(min(TEACHER_IMAGES, checked_images(original.spec, TEACHER_IMAGES)))
    class_ids = checked_classes(original.spec, len(seeds))
    labels = {"float32": original, "half precision": half}
    before, after = (_images(open_engine(bundle, "torch"), seeds, class_ids, shows, label) for label, bundle in labels.items())
    return rounding_of(before, after, "fp16")


def _images(
    engine: Engine, seeds: Sequence[int], class_ids: np.ndarray | None, shows: ProgressFactory, label: str
) -> np.ndarray:
    with shows(label, len(seeds), "images") as shown:
        parts = []
        for part in generate_batches(engine, seeds, class_ids, _IMAGES_AT_ONCE):
            parts.append(part)
            shown.advance(len(part))
    return np.concatenate(parts)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _published_spec(original: Bundle, facts: Mapping[str, object]) -> ModelSpec:
    """The spec without folders of this machine, and with the hash of the weights that it was made of."""
    published = {"weights_sha256": original.weights_sha256, **facts}
    kept = {key: without_folders(value) for key, value in original.spec.provenance.items()}
    return replace(original.spec, provenance={**kept, "published": published})


def renew_card(path: Path, scores: Sequence[EvaluationResult]) -> Path:
    """Writes the card and the sheet of a published bundle anew, from what it says of itself and from scores of its weights.

    Returns the card's path. Raises RequestError for a teacher, for scores of other weights, and for what was not published to
    a folder of the user's.
    """
    bundle = Bundle.open(path)
    check_exportable(bundle)
    check_scores(scores, bundle, bundle)
    engine = bundle.engine_folder(EngineId.parse(ENGINE))
    # The folder behind a name belongs to the package; one without the engine is a run's, or somebody else's.
    if not (path / CONFIG).is_file() or not engine.is_dir():
        remedy = f"publish it first: uni-instruct publish {quote(str(path))} --out FOLDER"
        raise RequestError(f"{path} is not the folder of a published generator", remedy=remedy, param="folder")
    record = EngineRecord.read(engine)
    command, sheet = sample_sheet(bundle)
    card = published_card(bundle, _noted_rounding(bundle), record, scores, command)
    for name, content in ((SAMPLES, encode(sheet)), (CARD, card.encode())):
        with atomic_file(path / name) as partial:
            partial.write_bytes(content)
    return path / CARD


def _noted_rounding(bundle: Bundle) -> Rounding | None:
    """What publishing noted of it; None where nothing was rounded."""
    noted = bundle.spec.provenance.get("published")
    if not isinstance(noted, dict):
        return None
    facts = {name: noted[name] for name in ("images", "largest_difference", "changed_pixels", "precision")}
    return Rounding(**facts, too_large=noted.get("too_large", ""))


def open_generator(source: str | Path) -> Bundle:
    """The generator of a run's folder, or whatever `Bundle.open` takes."""
    of_run = Path(source) / "generator"
    return Bundle.open(of_run if not (Path(source) / CONFIG).is_file() and (of_run / CONFIG).is_file() else source)


def store(original: Bundle, folder: Path, shows: ProgressFactory = silent) -> tuple[Bundle, Rounding]:
    """The bundle's weights in `folder`: in half precision where that holds them and moves no pixel by more than a level."""
    from uni_instruct.networks.reference import make_reference

    spec, weights, decoder = original.spec, original.weights(), original.decoder_weights()
    if name := too_large(weights):
        rounding = without_half(name)
    else:
        half = Bundle.write(folder, spec, weights, "", precision="fp16", decoder=decoder)
        rounding = half_precision_changes(original, half, shows)
    spec = _published_spec(original, asdict(rounding))
    reference = partial(make_reference, shows=shows)
    bundle = Bundle.write(folder, spec, weights, "", precision=rounding.precision, decoder=decoder, reference=reference)
    return bundle, rounding


def without_folders(value: object) -> object:
    """The value with each absolute path in it cut down to its last part: folders of this machine are nobody's business."""
    if isinstance(value, Mapping):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def sample_sheet(bundle: Bundle, shows: ProgressFactory = silent) -> tuple[str, np.ndarray]:
    """The command that makes the sheet, and the sheet: a row for each class, or a square without classes or of many."""
    spec = bundle.spec
    rows = spec.num_classes if 0 < spec.num_classes <= SHEET_ROWS else 0
    seeds = range((rows or SHEET_COLUMNS) * SHEET_COLUMNS)
    class_ids = resolve_class_ids(spec, seeds, by_class(spec, seeds) if rows else None)
    images = _images(open_engine(bundle, ENGINE), seeds, class_ids, shows, SAMPLES)
    command = f"uni-instruct generate . --seeds 0-{len(seeds) - 1}{' --by-class' if rows else ''} --grid samples.png"
    return command, contact_sheet(images, SHEET_COLUMNS)


def read_scores(path: Path) -> EvaluationResult:
    """What `evaluate --json` wrote of a generator. Raises FileFormatError for anything else."""
    remedy = "give what 'uni-instruct evaluate GENERATOR --json' printed"
    try:
        facts = parse_result(json.loads(path.read_text()))
        required = (facts["scores"]["generator"]["weights_sha256"], facts["reference"]["name"], facts["seeds"])
    except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} holds no scores of a generator", remedy=remedy, param="scores") from error
    if not all(isinstance(value, str) for value in required):
        raise FileFormatError(f"{path} does not say what was scored", remedy=remedy, param="scores")
    return facts


def check_scores(scores: Sequence[EvaluationResult], original: Bundle, published: Bundle) -> None:
    """Raises RequestError where one was measured on weights that are neither the original's nor the published ones."""
    for facts in scores:
        found = facts["scores"]["generator"]["weights_sha256"]
        if found not in (original.weights_sha256, published.weights_sha256):
            raise RequestError(
                f"scores of {facts['scores']['generator'].get('source')} are of other weights, sha256 {str(found)[:16]}",
                remedy="evaluate what is published",
                param="scores",
            )


def _check_replaceable(out: Path, original: Bundle) -> None:
    refuse_file_name(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    published: object = {}
    if (out / CONFIG).is_file() and out.resolve() != original.path.resolve():
        published = Bundle.open(out).spec.provenance.get("published")
    if not isinstance(published, dict) or published.get("weights_sha256") != original.weights_sha256:
        raise RequestError(
            f"{out} holds something else than an earlier publication of these weights",
            remedy="name another folder",
            param="out",
        )
