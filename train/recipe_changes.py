"""What of a recipe may change when a run goes on, and what to do instead where it may not."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from uni_instruct.checkpoints.import_bundle import open_or_import
from uni_instruct.data import open_dataset
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.files import JSON_ERRORS
from uni_instruct.train.config import Recipe
from uni_instruct.train.recipe import all_keys

DATA_NOTE = Path("state") / "data.json"  # what the data of a run are; same_data.py reads and writes it
Changes = dict[str, tuple[object, object]]  # key -> (before, now)

# What training does not depend on: words, logs, evaluation, memory, and how products are computed.
FREE = frozenset(
    {"name", "measured", "published", "teacher.micro_batch", "distillation.micro_batch"}
    | {"teacher.evaluate_kimg", "distillation.evaluate_kimg"}
    | {key for key in all_keys() if key.startswith("loop.") and key != "loop.seed"}
)
_STAGE = ("duration_kimg", "warmup_kimg", "decay_kimg", "decay")
# What a stage goes on with from where it stands: its length, rates and bounds, and the weights of the terms.
TUNING = {
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
_STAGE_NAMES = {"teacher": "teacher", "distillation": "generator"}  # by their sections


def holds_training(folder: Path) -> bool:
    """Whether a run's folder has anything that was trained; a recipe alone claims nothing."""
    kept = ("log.jsonl", "teacher", "generator", "snapshots")
    return any((folder / name).exists() for name in kept) or any((folder / "state").glob("*.pt"))


def allowed_changes(folder: Path, old: Recipe, new: Recipe) -> Changes:
    """What differs between the recipe that a run was trained by and the one that it is to go on with.

    Raises RequestError, with what to do instead, for a change that what is trained already does not allow.
    """
    before, now = flat(old.to_dict()), flat(new.to_dict())
    changes = {key: (before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)}
    # What was asked for, before what comes with it: a method sets keys of its section that nobody has written.
    sections = list(dict.fromkeys(key.partition(".")[0] for key in changes))
    ordered = sorted(changes, key=lambda key: (sections.index(key.partition(".")[0]), key != "objective.method"))
    for key in ordered:
        was, wanted = changes[key]
        general = re.sub(r"^schedule\[\d+\]\.", "", key)
        section = next((section for section, keys in TUNING.items() if general in keys), None)
        if old.needs_discriminator != new.needs_discriminator and key.endswith("_scale"):
            raise _refused(folder, key, was, wanted)  # networks would come or go
        if section is not None and was is not None and wanted is not None:
            _check_can_be_tuned(folder, key, was, wanted, section, new)
        elif general == "data" and was and wanted:
            _check_same_data(folder, str(was), str(wanted))
        elif general == "teacher.bundle" and was and wanted:
            _check_same_teacher(folder, str(was), str(wanted))
        elif general not in FREE:
            raise _refused(folder, key, was, wanted)
    return changes


def saved_step(folder: Path, stage: str) -> int:
    """The step of a stage's state; 0 where there is none."""
    with suppress(OSError, *JSON_ERRORS, KeyError, TypeError, OverflowError):
        return int(json.loads((folder / "state" / f"{stage}.json").read_text())["step"])
    return 0


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with the keys of a recipe in full; the phases of a schedule are numbered."""
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
    """Raises RequestError where the stage is over, or its end would lie before where it stands."""
    stage, config = _STAGE_NAMES[section], getattr(new, section)
    done, was, wanted = saved_step(folder, stage), _as_typed(was), _as_typed(wanted)
    if section == "teacher" and (saved_step(folder, "generator") or (folder / "generator").exists()):
        problem = f"{key}={wanted}: the generator in {folder} was distilled from its teacher as it is, with {was}"
        raise RequestError(problem, remedy=f"leave it at {was}, or choose another --out", param="out")
    if not done or config.total_steps > done:
        return
    kimg = f"{done * config.batch / 1000:g}"
    if key == f"{section}.duration_kimg":
        problem, remedy = f"{key}={wanted}: the run has done {kimg} already", f"give more than {kimg}, or leave it at {was}"
    else:
        problem = f"{key}={wanted}: the {stage} in {folder} is trained to its end at {kimg} kimg, with {was}"
        remedy = f"lengthen {section}.duration_kimg too, or choose another --out"
    raise RequestError(problem, remedy=remedy, param="out")


def _check_same_data(folder: Path, was: str, wanted: str) -> None:
    """Raises RequestError unless another path leads to the same images and labels."""
    if (folder / DATA_NOTE).exists():
        return  # check_same_data compares with that, whether or not the old path still leads somewhere
    if Path(was).exists() and Path(wanted).exists() and Path(was).samefile(wanted):
        return
    try:
        old, new = open_dataset(was), open_dataset(wanted)
        same = len(old) == len(new) and old.image_shape == new.image_shape and old.fingerprint() == new.fingerprint()
    except UniInstructError as error:
        problem = f"{folder} holds a run on data={was}, which cannot be compared with {wanted} ({error.problem})"
        raise RequestError(problem, remedy=f"link the data to {was}, or choose another --out", param="out") from error
    if not same:
        raise _refused(folder, "data", was, wanted)


def _check_same_teacher(folder: Path, was: str, wanted: str) -> None:
    """Raises RequestError unless another path leads to the same teacher's weights."""
    # Weights are the same whatever they make; plan.py knows by the data whether that is latents.
    digest = open_or_import(wanted, "teacher", latents=True).weights_sha256
    try:
        same = open_or_import(was, "teacher", latents=True).weights_sha256 == digest
    except UniInstructError as error:
        problem = f"{folder} holds a run with teacher.bundle={was}, which cannot be compared with {wanted} ({error.problem})"
        raise RequestError(problem, remedy=f"link the teacher to {was}, or choose another --out", param="out") from error
    if not same:
        raise _refused(folder, "teacher.bundle", was, wanted)


def _refused(folder: Path, key: str, was: object, wanted: object) -> RequestError:
    was, wanted = _as_typed(was), _as_typed(wanted)
    whole = f"the schedule as {folder / 'recipe.yaml'} has it" if key.startswith("schedule") else f"it at {was}"
    remedy = f"leave {whole}, or choose another --out"
    if key.startswith(("objective.", "schedule")) and all((folder / name).exists() for name in ("teacher", "generator")):
        remedy += f" with teacher={folder}/teacher distillation.start={folder}/generator, which goes on from there"
    return RequestError(f"{folder} holds a run with {key}={was}, not {wanted}", remedy=remedy, param="out")


def _as_typed(value: object) -> object:
    """A value as --set takes it, where Python writes it otherwise, or as nothing at all."""
    if value is None:
        return "null"
    return "''" if value == "" else value
