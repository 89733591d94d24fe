"""Publish a trained generator: weights in half precision if that changes no image visibly, an engine, samples, a model card."""

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
from uni_instruct.export.checked_images import check_class_ids, checked_images
from uni_instruct.export.half_precision import half_precision_changes, rounding_of, too_large, without_half
from uni_instruct.export.targets import TARGETS, check_exportable, export_engine
from uni_instruct.generate import by_class, generate_batches, resolve_class_ids
from uni_instruct.images import contact_sheet, encode
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import JSON_ERRORS, atomic_file, atomic_folder, refuse_file_name
from uni_instruct.system.progress import ProgressFactory, silent

# The engine that ships, as it runs on every machine.
ENGINE = "onnx-fp32"
# The most images to compare of a teacher: each takes dozens of network evaluations.
TEACHER_IMAGES = 64
# The sample sheet has SHEET_COLUMNS images of each class, if there are at most SHEET_ROWS classes.
SHEET_COLUMNS, SHEET_ROWS = 16, 16
# Images per batch. The progress bar advances after each batch.
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What was published. path: its folder. file_bytes: file -> size in bytes. engine: None for a teacher."""

    path: str
    name: str
    rounding: Rounding
    engine: EngineRecord | None
    file_bytes: Mapping[str, int]


def publish(source: str | Path, out: Path, scores: Sequence[Path] = (), with_progress: ProgressFactory = silent) -> Publication:
    """Publish a bundle, or the generator of a run, to the folder `out`, completely or not at all.

    A teacher is published to be distilled from. It is stored in half precision whatever that changes, unless its weights are
    too large for that; its card is kept, and says what changed. scores: files that `evaluate --json` wrote, for the card of a
    generator. with_progress: makes the progress bars.

    Raises RequestError for a generator of latents, for scores of other weights or of a teacher, and if `out` holds anything but
    an earlier publication of the same weights; MissingExtraError, ParityError and DiskError as `export_engine` does.
    """
    original = open_generator(source)
    if original.spec.steps > 1:
        return _publish_teacher(original, out, scores, with_progress)
    check_exportable(original)
    TARGETS[ENGINE].check_packages()
    _check_replaceable(out, original)
    read = [read_scores(path) for path in scores]
    with atomic_folder(out) as folder:
        bundle, rounding = store(original, folder, with_progress)
        check_scores(read, original, bundle)
        record = export_engine(bundle, ENGINE, with_progress=with_progress)
        command, sheet = sample_sheet(bundle, with_progress)
        (folder / SAMPLES).write_bytes(encode(sheet))
        card = published_card(bundle, rounding, record, read, command)
        (folder / CARD).write_text(card)
    return Publication(path=str(out), name=original.spec.name, rounding=rounding, engine=record, file_bytes=_sizes(out))


def _publish_teacher(original: Bundle, out: Path, scores: Sequence[Path], with_progress: ProgressFactory) -> Publication:
    if scores:
        problem = f"{original.path} is a teacher, and its card already has the scores from its training"
        raise RequestError(problem, remedy="leave --scores out", param="scores")
    _check_replaceable(out, original)
    samples, weights = original.path / SAMPLES, original.weights()
    with atomic_folder(out) as folder:
        sheet = samples.read_bytes() if samples.exists() else None
        name = too_large(weights)
        stored = Bundle.write(folder, _published_spec(original, {}), weights, "", sheet, precision="fp32" if name else "fp16")
        rounding = without_half(name) if name else _teacher_rounding(original, stored, with_progress)
        (folder / CARD).write_text((original.path / CARD).read_text() + "\n" + teacher_weights(rounding))
    return Publication(path=str(out), name=original.spec.name, rounding=rounding, engine=None, file_bytes=_sizes(out))


def _teacher_rounding(original: Bundle, half: Bundle, with_progress: ProgressFactory) -> Rounding:
    seeds = range(min(TEACHER_IMAGES, checked_images(original.spec, TEACHER_IMAGES)))
    class_ids = check_class_ids(original.spec, len(seeds))
    labels = {"float32": original, "half precision": half}
    before, after = (
        _images(open_engine(bundle, "torch"), seeds, class_ids, with_progress, label) for label, bundle in labels.items()
    )
    return rounding_of(before, after, "fp16")


def _images(
    engine: Engine, seeds: Sequence[int], class_ids: np.ndarray | None, with_progress: ProgressFactory, label: str
) -> np.ndarray:
    with with_progress(label, len(seeds), "images") as bar:
        parts = []
        for part in generate_batches(engine, seeds, class_ids, _IMAGES_AT_ONCE):
            parts.append(part)
            bar.advance(len(part))
    return np.concatenate(parts)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _published_spec(original: Bundle, facts: Mapping[str, object]) -> ModelSpec:
    """The spec without paths of this machine, with the hash of the original weights and `facts` as provenance['published']."""
    published = {"weights_sha256": original.weights_sha256, **facts}
    kept = {key: without_folders(value) for key, value in original.spec.provenance.items()}
    return replace(original.spec, provenance={**kept, "published": published})


def rewrite_card(path: Path, scores: Sequence[EvaluationResult]) -> Path:
    """Rewrite the card and the sample sheet of a published bundle, from its own records and from scores of its weights.

    Returns the card's path. Raises RequestError for a teacher, for scores of other weights, and if `path` is not a folder to
    which a generator was published.
    """
    bundle = Bundle.open(path)
    check_exportable(bundle)
    check_scores(scores, bundle, bundle)
    engine = bundle.engine_folder(EngineId.parse(ENGINE))
    # A name of a shipped generator is no folder: that generator belongs to the installed package, and must not be changed. A
    # bundle without the engine was not published.
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
    """The rounding that publishing recorded in the bundle; None if there is no such record."""
    noted = bundle.spec.provenance.get("published")
    if not isinstance(noted, dict):
        return None
    facts = {name: noted[name] for name in ("images", "largest_difference", "changed_pixels", "precision")}
    return Rounding(**facts, too_large=noted.get("too_large", ""))


def open_generator(source: str | Path) -> Bundle:
    """Open the generator in a run's folder, or whatever `Bundle.open` accepts."""
    of_run = Path(source) / "generator"
    return Bundle.open(of_run if not (Path(source) / CONFIG).is_file() and (of_run / CONFIG).is_file() else source)


def store(original: Bundle, folder: Path, with_progress: ProgressFactory = silent) -> tuple[Bundle, Rounding]:
    """Write the bundle to `folder`, in half precision if that can hold its weights and changes no pixel by more than one level.

    Returns the new bundle, and what half precision changes.
    """
    from uni_instruct.networks.reference import make_reference

    spec, weights, decoder = original.spec, original.weights(), original.decoder_weights()
    if name := too_large(weights):
        rounding = without_half(name)
    else:
        half = Bundle.write(folder, spec, weights, "", precision="fp16", decoder=decoder)
        rounding = half_precision_changes(original, half, with_progress)
    spec = _published_spec(original, asdict(rounding))
    reference = partial(make_reference, with_progress=with_progress)
    bundle = Bundle.write(folder, spec, weights, "", precision=rounding.precision, decoder=decoder, reference=reference)
    return bundle, rounding


def without_folders(value: object) -> object:
    """The value with each absolute path in it reduced to its last part, so that no folder of this machine is published."""
    if isinstance(value, Mapping):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def sample_sheet(bundle: Bundle, with_progress: ProgressFactory = silent) -> tuple[str, np.ndarray]:
    """The command that makes the sample sheet, and the sheet as pixels uint8 [H, W, C].

    One row per class; without classes, or with more than SHEET_ROWS, a square of the first seeds.
    """
    spec = bundle.spec
    rows = spec.num_classes if 0 < spec.num_classes <= SHEET_ROWS else 0
    seeds = range((rows or SHEET_COLUMNS) * SHEET_COLUMNS)
    class_ids = resolve_class_ids(spec, seeds, by_class(spec, seeds) if rows else None)
    images = _images(open_engine(bundle, ENGINE), seeds, class_ids, with_progress, SAMPLES)
    command = f"uni-instruct generate . --seeds 0-{len(seeds) - 1}{' --by-class' if rows else ''} --grid samples.png"
    return command, contact_sheet(images, SHEET_COLUMNS)


def read_scores(path: Path) -> EvaluationResult:
    """Read scores of a generator, as `evaluate --json` writes them. Raises FileFormatError for anything else."""
    remedy = "pass a file with the output of 'uni-instruct evaluate GENERATOR --json'"
    try:
        facts = parse_result(json.loads(path.read_text()))
        required = (facts["scores"]["generator"]["weights_sha256"], facts["reference"]["name"], facts["seeds"])
    except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} does not hold the scores of a generator", remedy=remedy, param="scores") from error
    if not all(isinstance(value, str) for value in required):
        raise FileFormatError(
            f"{path} lacks the hash of the weights, the name of the reference or the seeds", remedy=remedy, param="scores"
        )
    return facts


def check_scores(scores: Sequence[EvaluationResult], original: Bundle, published: Bundle) -> None:
    """Raises RequestError if any scores are of weights that are neither the original nor the published ones."""
    for facts in scores:
        generator = facts["scores"]["generator"]
        found = generator["weights_sha256"]
        if found not in (original.weights_sha256, published.weights_sha256):
            raise RequestError(
                f"the scores of {generator.get('source')} were measured on other weights (sha256 {str(found)[:16]}...)",
                remedy="run 'uni-instruct evaluate' on the generator that is published",
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
            f"{out} exists, and is not an earlier publication of these weights",
            remedy="name another folder",
            param="out",
        )
