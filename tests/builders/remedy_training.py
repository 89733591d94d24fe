# ruff: noqa: E501
"""Trainings that are refused before they begin or resume, and how each remedy is followed."""

import re
from pathlib import Path

import torch
from torch import Tensor

from builders.bundles import random_bundle
from builders.data_sets import grey_zip
from builders.plans import TINY
from builders.remedy_stages import said
from builders.remedy_values import Value, found
from uni_instruct.train.monitoring.status import read_status
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.divergences.custom import read_divergence
from uni_instruct.train.objective.reward import open_reward
from uni_instruct.train.optimization.ema import Averages
from uni_instruct.train.optimization.posthoc import reconstruct, save_snapshot
from uni_instruct.train.plan import make_plan
from uni_instruct.train.preflight import CHECKS, Preflight
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.run import Run
from uni_instruct.train.run_lock import refuse_foreign
from uni_instruct.train.scoring_choice import choose_scoring

LEVELS = (0, 80, 160, 240)


def plan(*changes: str) -> object:
    return make_plan(load_recipe("digits", [*TINY, *changes]))


def set_as_said(remedy: str, *changes: str) -> object:
    """The plan with what the remedy's --set gives."""
    return plan(*changes, found(r"--set (\S+)", remedy))


def bundle(tmp: Path, name: str, steps: int = 1, side: int = 8, num_classes: int = 10) -> str:
    """Made once a case: what follows the remedy may need it, too."""
    if not (tmp / name).exists():
        random_bundle(tmp / name, 1, steps, num_classes, (1, side, side))
    return str(tmp / name)


def teacher(tmp: Path) -> str:
    return f"teacher.bundle={bundle(tmp, 'teacher', 4)}"


def data(tmp: Path, labels: list[object] | None = None, side: int = 8, levels: tuple[int, ...] = LEVELS, **meta: int) -> str:
    return f"data={grey_zip(tmp / f'data{side}{len(set(levels))}{len(meta)}.zip', levels, labels, side, **meta)}"


def start(tmp: Path, side: int = 8) -> list[str]:
    return [teacher(tmp), f"distillation.start={bundle(tmp, f'start{side}', 1, side)}"]


def examined(subject: str, *changes: str, devices: int = 1, out: str | Path = "nowhere") -> str:
    """A check of `doctor`, or its refusal."""
    return CHECKS[subject](Preflight(load_recipe("digits", [*TINY, *changes]), Path(out), devices))


def holding(folder: Path, name: str) -> Path:
    """A folder with a file of somebody's in it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    return folder


def judged(*changes: str, source: str = "digits") -> object:
    recipe = load_recipe("digits", [f"data={source}", "loop.extractor=classifier", *changes])
    made = make_plan(recipe)
    return choose_scoring(recipe.loop, made.dataset)


def rewarded(tmp: Path, text: str) -> object:
    (tmp / "r.py").write_text(text)
    return open_reward(f"{tmp / 'r.py'}:f", (1, 8, 8), 0)


def status(folder: Path, recipe: str = "") -> object:
    if recipe:
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe)
    return read_status(folder)


def state(tmp: Path, content: bytes | None) -> object:
    """What a run finds of its teacher's state; () where there is none."""
    run = Run(tmp / "run", load_recipe("digits"), first_process=True)
    file = tmp / "run" / "state" / "teacher.pt"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)
    return run.load_state("teacher") or ()


def snapshots(tmp: Path, second: dict[str, Tensor] | bytes | None = None, kimg: float | None = None) -> object:
    """The average of two snapshots, of which the second is as given."""
    save_snapshot(tmp, 1.0, 0.05, {"a": torch.zeros(4)})
    save_snapshot(tmp, 2.0, 0.05, second if isinstance(second, dict) else {"a": torch.zeros(4)})
    if isinstance(second, bytes):
        _last(tmp).write_bytes(second)
    return reconstruct(tmp, 0.05, kimg)


def without_the_last(tmp: Path, remedy: str) -> object:
    assert remedy == "remove that file"
    _last(tmp).unlink()
    return reconstruct(tmp, 0.05)


def _last(tmp: Path) -> Path:
    return max(tmp.glob("power-*"))


def resumed(halflives: tuple[float, ...]) -> object:
    begun, module = Averages(torch.nn.Linear(1, 1), (1.0,), rampup_ratio=None), torch.nn.Linear(1, 1)
    Averages(module, halflives, rampup_ratio=None).load_state_dict(begun.state_dict())
    return begun


INK = f"{Path(__file__).with_name('ink.py')}:reward"
COMPLETE = "name: x\ndata: digits\nteacher: {duration_kimg: 1, batch: 8}\ndistillation: {duration_kimg: 1, batch: 8}\n"
GUIDED = ["objective.teacher_guidance=2", "network.conditional=false"]
LARGE = ["distillation.batch=1000000", "network.model_channels=128"]
AUGMENTED = "distillation.augment=0.1"
P, F, S, AV = ("train/plan.py", "train/preflight.py", "train/monitoring/status.py", "train/optimization/posthoc.py")
D, RW = "train/objective/divergences/custom.py", "train/objective/reward.py"
PLANS = [
    Value(P, "distillation.augment needs", lambda tmp: plan(teacher(tmp), AUGMENTED), lambda remedy, tmp: set_as_said(remedy, teacher(tmp))),
    Value(P, "distillation.augment needs", lambda tmp: plan(teacher(tmp), AUGMENTED), lambda remedy, _: said(remedy, "train one with teacher.augment", plan("teacher.augment=0.1", AUGMENTED))),
    Value(P, "data set '{}' has no classes", lambda tmp: plan(data(tmp)), lambda remedy, tmp: set_as_said(remedy, data(tmp))),
    Value(P, "distillation.start {} has", lambda tmp: plan(*start(tmp, 16)), lambda remedy, tmp: said(remedy, "or leave distillation.start out", plan(teacher(tmp)))),
    Value(P, "distillation.start {} has", lambda tmp: plan(*start(tmp, 16)), lambda remedy, tmp: said(remedy, "a generator with the same network as the teacher", plan(*start(tmp)))),
    Value(P, "(_open_rewards)", lambda _: plan("reward_scale=1", "reward=a:f", "schedule=[{until_kimg: 0.08, objective: {reward_scale: 1, reward: b:f}}]"),
          lambda remedy, _: said(remedy, "give all phases the same reward", plan("reward_scale=1", f"reward={INK}", f"schedule=[{{until_kimg: 0.08, objective: {{reward_scale: 1, reward: '{INK}'}}}}]"))),
    Value(P, "classifier-free guidance needs a teacher with classes", lambda _: plan(*GUIDED),
          lambda remedy, _: plan(*GUIDED, *(f"objective.{key}={remedy.split()[-1]}" for key in re.findall(r"\w+_guidance", remedy)))),
    Value(P, "teacher {} is a one-step", lambda tmp: plan(f"teacher.bundle={bundle(tmp, 'one')}"), lambda remedy, tmp: said(remedy, "give the teacher that", plan(teacher(tmp)))),
    Value(P, "teacher {} is a one-step", lambda tmp: plan(f"teacher.bundle={bundle(tmp, 'one')}"),
          lambda remedy, tmp: plan(teacher(tmp), f"{found(r'with (distillation.start)', remedy)}={bundle(tmp, 'one')}")),
    Value(P, "teacher {} makes images of shape", lambda tmp: plan(teacher(tmp), data(tmp, side=16)), lambda remedy, tmp: said(remedy, "give the data that the teacher", plan(teacher(tmp), "data=digits"))),
    Value(P, "teacher {} has {} classes", lambda tmp: plan(teacher(tmp), data(tmp), "method=dmd2"),
          lambda remedy, tmp: said(remedy, "give the data that the teacher", plan(teacher(tmp), "data=digits", "method=dmd2"))),
    Value("train/scoring_choice.py", "loop.extractor=classifier", lambda tmp: judged(source=data(tmp, [0, 1, 2, 0])[5:]),
          lambda remedy, tmp: judged(found(r"--set (\S+)", remedy), source=data(tmp, [0, 1, 2, 0])[5:])),
    Value("train/objective/config.py", "the expanded family has no term", lambda _: ObjectiveConfig(di=False, fgm=False, sim=False),
          lambda remedy, _: ObjectiveConfig(di=said(remedy, "set one of them to true", True), fgm=False, sim=False)),
    Value(D, "divergence f(r)", lambda _: read_divergence("r*log(r) + 1"), lambda remedy, _: read_divergence("r*log(r) + 1" + said(remedy, "subtract that value from f", " - 1"))),
    Value(D, "divergence f(r)", lambda _: read_divergence("-r*log(r)"), lambda remedy, _: read_divergence(said(remedy, "give a convex f", "r*log(r)"))),
    Value(D, "divergence f(r)", lambda _: read_divergence("2*r - 2"), lambda remedy, _: read_divergence(said(remedy, "a strictly convex f", "(r - 1)**2"))),
    Value(D, "divergence f(r)", lambda _: read_divergence("exp(r**9) - exp(1 + 0*r)"), lambda remedy, _: read_divergence(said(remedy, "finite for r in 1e-3..1e3", "(r - 1)**2"))),
    Value(RW, "reward '{}'", lambda tmp: rewarded(tmp, "def f(images, ids): return images.sum()"),
          lambda remedy, tmp: rewarded(tmp, f"def f(images, ids): return images.mean((1, 2, 3))  # {said(remedy, 'returns differentiable rewards [B]', '')}")),
]  # fmt: skip
DOCTOR = [
    Value(F, "(_data)", lambda tmp: examined("data", data(tmp, levels=(7, 7))), lambda remedy, tmp: said(remedy, "a data set of real pictures", examined("data", data(tmp)))),
    Value(F, "{} of the {} classes of", lambda tmp: examined("data", data(tmp, [0, 1, 0, 1], num_classes=3)), lambda remedy, tmp: said(remedy, "whose labels have no unused classes", examined("data", data(tmp, [0, 1, 0, 1], num_classes=2)))),
    Value("train/optimization/distributed.py", "{}.batch {} cannot be divided", lambda _: examined("devices", "teacher.batch=128", devices=3), lambda remedy, _: examined("devices", "distillation.batch=6", found(r"--set (\S+),", remedy), devices=3)),
    Value(F, "loop.precision 16-mixed", lambda _: examined("devices", "precision=16-mixed"), lambda remedy, _: examined("devices", found(r"--set (\S+)", remedy))),
    Value("train/run_lock.py", "{} would be replaced", lambda tmp: refuse_foreign(holding(tmp / "a", "report/x")), lambda remedy, tmp: said(remedy, "choose another --out", refuse_foreign(holding(tmp / "b", "notes/x")) or "free")),
    Value(F, "nothing can be written into", lambda _: examined("disk", out=__file__), lambda remedy, tmp: said(remedy, "choose another --out", examined("disk", out=tmp))),
    Value(F, "(_memory)", lambda _: examined("memory", *LARGE), lambda remedy, _: examined("memory", *LARGE, f"{found(r'lower (distillation.micro_batch)', remedy)}=64")),
    Value(F, "(_disk)", lambda _: examined("disk", "distillation.ema_power_std=[0.05, 0.1]", "distillation.duration_kimg=44.8", "snapshot_kimg=1e-6"), lambda remedy, _: examined("disk", "distillation.ema_power_std=[0.05, 0.1]", "distillation.duration_kimg=44.8", f"{found(r'raise (loop.snapshot_kimg)', remedy)}=0.1")),
]  # fmt: skip
RESUMED = [
    Value(S, "(_check_is_run)", lambda tmp: status(tmp / "none"), lambda remedy, tmp: status(tmp / "none", COMPLETE if "--out" in remedy else "")),
    Value(S, "(_check_is_run)", lambda tmp: [status(tmp / "a", COMPLETE), status(tmp)], lambda remedy, _: status(Path(found(r"give (\S+)", remedy)))),
    Value(S, "(_length)", lambda tmp: status(tmp / "a", "name: x\n"), lambda remedy, tmp: status(tmp / "a", said(remedy, "whose recipe.yaml is complete", COMPLETE))),
    Value("train/run.py", "state {} cannot be read", lambda tmp: state(tmp, b"cut"), lambda remedy, tmp: state(tmp, said(remedy, "delete it", None))),
    Value("train/optimization/ema.py", "the state holds the averages", lambda _: resumed((1.0, 2.0)), lambda remedy, _: resumed(said(remedy, "the half-lives and widths of averages", (1.0,)))),
    Value(AV, "time {} kimg of a snapshot", lambda tmp: save_snapshot(tmp, 0.0, 0.05, {}), lambda remedy, tmp: save_snapshot(tmp, said(remedy, "after at least one step", 0.001), 0.05, {}) is None),
    Value(AV, "{} has no snapshots", lambda tmp: reconstruct(tmp, 0.05), lambda remedy, tmp: said(remedy, "a run that was trained with snapshots", snapshots(tmp))),
    Value(AV, "time {} kimg is not covered", lambda tmp: snapshots(tmp, kimg=3.0), lambda remedy, tmp: snapshots(tmp, kimg=float(found(r"up to (\S+)", remedy)))),
    Value(AV, "snapshot {} cannot be read", lambda tmp: snapshots(tmp, b"cut"), lambda remedy, tmp: without_the_last(tmp, remedy)),
    Value(AV, "snapshot {} has other tensor names or shapes", lambda tmp: snapshots(tmp, {"b": torch.zeros(4)}), lambda remedy, tmp: without_the_last(tmp, remedy)),
]  # fmt: skip
