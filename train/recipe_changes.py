"""Which keys of a recipe may change when a run is resumed, and what to do instead if a key may not change."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from uni_instruct.checkpoints.import_bundle import open_or_import
from uni_instruct.data import open_dataset
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.system.files import JSON_ERRORS
from uni_instruct.train.config import Recipe
from uni_instruct.train.recipe import all_keys

DATA_DESCRIPTION = Path("state") / "data.json"  # the description of a run's data, read and written by data_fingerprint.py
Changes = dict[str, tuple[object, object]]  # key -> (before, now)

# Keys that may always change: descriptions, logs, evaluation, micro-batches, and the precision of products.
ALWAYS_CHANGEABLE = frozenset(
    {"name", "measured", "published", "teacher.micro_batch", "distillation.micro_batch"}
    | {"teacher.evaluate_kimg", "distillation.evaluate_kimg"}
    | {key for key in all_keys() if key.startswith("loop.") and key != "loop.seed"}
)
_STAGE = ("duration_kimg", "warmup_kimg", "decay_kimg", "decay")
# Keys that may change while a stage is not finished: its length, learning rates, clipping, and the scales of the terms.
CHANGEABLE_WHILE_TRAINING = {
    "teacher": frozenset(f"teacher.{name}" for name in (*_STAGE, "learning_rate", "clip_norm")),
    "distillation": frozenset(
        {f"distillation.{name}" for name in (*_STAGE, "critic_warmup_kimg", "beta1", "beta2", "adam_eps")}
        | {f"distillation.{who}_learning_rate" for who in ("generator", "critic", "discriminator")}
        | {f"distillation.{who}_clip_{what}" for who in ("generator", "critic") for what in ("norm", "value")}
        | {f"objective.{name}_scale" for name in ("divergence", "adversarial", "regression", "reward", "discriminator")}
        | {f"objective.{name}" for name in ("tmin", "tmax", "logit_clamp", "critic_updates", "ratio_momentum")}
        | {"until_kimg"}
    ),
}
_STAGE_NAMES = {"teacher": "teacher", "distillation": "generator"}  # section of the recipe -> stage


def holds_training(folder: Path) -> bool:
    """Whether a run's folder contains any result of training. A recipe.yaml alone does not count."""
    kept = ("log.jsonl", "teacher", "generator", "snapshots")
    return any((folder / name).exists() for name in kept) or any((folder / "state").glob("*.pt"))


def allowed_changes(folder: Path, old: Recipe, new: Recipe) -> Changes:
    """The keys that differ between a run's old recipe and the one with which it is resumed: key -> (before, now).

    Raises RequestError, with a remedy, for a change that is not allowed.
    """
    before, now = flat(old.to_dict()), flat(new.to_dict())
    changes = {key: (before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)}
    # The method first: it sets other keys of its section, which the user did not write.
    sections = list(dict.fromkeys(key.partition(".")[0] for key in changes))
    ordered = sorted(changes, key=lambda key: (sections.index(key.partition(".")[0]), key != "objective.method"))
    for key in ordered:
        was, wanted = changes[key]
        general = re.sub(r"^schedule\[\d+\]\.", "", key)
        section = next((section for section, keys in CHANGEABLE_WHILE_TRAINING.items() if general in keys), None)
        if old.needs_discriminator != new.needs_discriminator and key.endswith("_scale"):
            raise _refused(folder, key, was, wanted)  # the discriminator would be added or removed
        if section is not None and was is not None and wanted is not None:
            _check_can_be_tuned(folder, key, was, wanted, section, new)
        elif general == "data" and was and wanted:
            _check_same_data(folder, str(was), str(wanted))
        elif general == "teacher.bundle" and was and wanted:
            _check_same_teacher(folder, str(was), str(wanted))
        elif general not in ALWAYS_CHANGEABLE:
            raise _refused(folder, key, was, wanted)
    return changes


def saved_step(folder: Path, stage: str) -> int:
    """The step of a stage's saved state; 0 if there is none."""
    with suppress(OSError, *JSON_ERRORS, KeyError, TypeError, OverflowError):
        return int(json.loads((folder / "state" / f"{stage}.json").read_text())["step"])
    return 0


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one mapping with full keys, such as objective.alpha and schedule[0].objective.alpha."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif key == "schedule" and isinstance(value, Sequence):
            for number, phase in enumerate(value):
                found |= flat(phase, f"schedule[{number}].")
        else:
            found[prefix + key] = value
    return found


def _check_can_be_tuned(folder: Path, key: str, was: object, wanted: object, section: str, new: Recipe) -> None:
    """Raise RequestError if the stage is finished, or if its new length is not longer than what is done.

    The teacher's keys may not change either after the generator has been started from it.
    """
    stage, config = _STAGE_NAMES[section], getattr(new, section)
    done, was, wanted = saved_step(folder, stage), _as_typed(was), _as_typed(wanted)
    if section == "teacher" and (saved_step(folder, "generator") or (folder / "generator").exists()):
        problem = (
            f"{key}={wanted}: the generator in {folder} has already been started from the teacher, which was trained with {was}"
        )
        raise RequestError(problem, remedy=f"leave it at {was}, or choose another --out", param="out")
    if not done or config.total_steps > done:
        return
    kimg = f"{done * config.batch / 1000:g}"
    if key == f"{section}.duration_kimg":
        problem, remedy = (
            f"{key}={wanted}: the run has already trained for {kimg} kimg",
            f"give more than {kimg}, or leave it at {was}",
        )
    else:
        problem = f"{key}={wanted}: the {stage} in {folder} is finished: it was trained for {kimg} kimg with {was}"
        remedy = f"lengthen {section}.duration_kimg too, or choose another --out"
    raise RequestError(problem, remedy=remedy, param="out")


def _check_same_data(folder: Path, was: str, wanted: str) -> None:
    """Raise RequestError unless both paths lead to the same images and labels."""
    if (folder / DATA_DESCRIPTION).exists():
        return  # check_same_data compares with this description, which works even if the old path no longer exists
    if Path(was).exists() and Path(wanted).exists() and Path(was).samefile(wanted):
        return
    try:
        old, new = open_dataset(was), open_dataset(wanted)
        same = len(old) == len(new) and old.image_shape == new.image_shape and old.fingerprint() == new.fingerprint()
    except UniInstructError as error:
        problem = f"{folder} contains a run on data={was}, which cannot be compared with {wanted} ({error.problem})"
        raise RequestError(
            problem, remedy=f"make {was} lead to the data again, for example by a link, or choose another --out", param="out"
        ) from error
    if not same:
        raise _refused(folder, "data", was, wanted)


def _check_same_teacher(folder: Path, was: str, wanted: str) -> None:
    """Raise RequestError unless both paths lead to the same teacher's weights."""
    # latents=True accepts teachers of latents and of images. Here only the hash of the weights matters.
    digest = open_or_import(wanted, "teacher", latents=True).weights_sha256
    try:
        same = open_or_import(was, "teacher", latents=True).weights_sha256 == digest
    except UniInstructError as error:
        problem = f"{folder} contains a run with teacher.bundle={was}, which cannot be compared with {wanted} ({error.problem})"
        raise RequestError(
            problem, remedy=f"make {was} lead to the teacher again, for example by a link, or choose another --out", param="out"
        ) from error
    if not same:
        raise _refused(folder, "teacher.bundle", was, wanted)


def _refused(folder: Path, key: str, was: object, wanted: object) -> RequestError:
    was, wanted = _as_typed(was), _as_typed(wanted)
    whole = f"the schedule as {folder / 'recipe.yaml'} has it" if key.startswith("schedule") else f"it at {was}"
    remedy = f"leave {whole}, or choose another --out"
    if key.startswith(("objective.", "schedule")) and all((folder / name).exists() for name in ("teacher", "generator")):
        remedy += f" with teacher={folder}/teacher distillation.start={folder}/generator, to start a new distillation from them"
    problem = f"{folder} contains a run with {key}={was}, which a resumed run cannot change to {wanted}"
    return RequestError(problem, remedy=remedy, param="out")


def _as_typed(value: object) -> object:
    """The value as it must be typed after `--set key=`, for values that Python prints differently."""
    if value is None:
        return "null"
    return "''" if value == "" else value
