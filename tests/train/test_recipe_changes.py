"""A run that goes on with a changed recipe: what may change does and is noted, what may not is refused with what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from builders.runs import run_at
from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.train.config import Recipe
from uni_instruct.train.monitoring.health import SYMPTOMS
from uni_instruct.train.monitoring.history import read_history
from uni_instruct.train.monitoring.nonfinite import ADVICE
from uni_instruct.train.pipeline import train
from uni_instruct.train.recipe import load_recipe, recipe_fields
from uni_instruct.train.recipe_changes import (
    ALWAYS_CHANGEABLE,
    CHANGEABLE_WHILE_TRAINING,
    allowed_changes,
    flat,
    holds_training,
    saved_step,
)
from uni_instruct.train.report.records import parse_history

# Everything that advice speaks of is on.
FULL = [
    "method=di-star",
    "reward=nowhere.py:f",
    "divergence=jeffreys",
    "adversarial_scale=0.1",
    "regression_scale=0.1",
    "tmin=10",
    "critic_warmup_kimg=1",
]
TINY = [
    "network.model_channels=16",
    "teacher.bundle=TEACHER",
    "distillation.batch=32",
    "distillation.duration_kimg=0.32",
    "distillation.decay_kimg=0",
    "critic_warmup_kimg=0.064",
    "distillation.evaluate_kimg=10",
    "loop.metric=none",
    "loop.grid=4",
    "loop.log_kimg=0.032",
    "loop.state_kimg=0.16",
    "loop.report=false",
    "trackers=[]",
]


def changed(folder: Path, *overrides: str, base: list[str] = FULL) -> dict[str, tuple[object, object]]:
    return allowed_changes(folder, load_recipe("digits", base), load_recipe("digits", [*base, *overrides]))


def test_every_key_of_the_table_is_one() -> None:
    known = set(recipe_fields(Recipe))
    assert known >= ALWAYS_CHANGEABLE
    assert CHANGEABLE_WHILE_TRAINING["teacher"] | CHANGEABLE_WHILE_TRAINING["distillation"] <= known | {"until_kimg"}
    assert not ALWAYS_CHANGEABLE & (CHANGEABLE_WHILE_TRAINING["teacher"] | CHANGEABLE_WHILE_TRAINING["distillation"])
    assert not {"loop.seed", "network.model_channels", "teacher.batch", "objective.alpha"} & ALWAYS_CHANGEABLE


def advised() -> list[tuple[str, str]]:
    """(verb, key) of all that training advises while it goes on."""
    found = set()
    for words in [*ADVICE.values(), *(symptom.remedy for symptom in SYMPTOMS.values())]:
        verb = ""
        for word in re.findall(r"\b(?:raise|lower|lengthen|clip)\b|\b(?:objective|distillation|teacher|loop)\.\w+", words):
            verb = word if word in ("raise", "lower", "lengthen", "clip") else verb
            if word != verb:
                found.add((verb, word))
    return sorted(found)


def test_advice_is_understood() -> None:
    assert len(advised()) > 12
    assert ("lower", "teacher.learning_rate") in advised()
    assert ("clip", "distillation.generator_clip_norm") in advised()


@pytest.mark.parametrize(("verb", "name"), advised(), ids=" ".join)
def test_whatever_training_advises_is_accepted_when_it_goes_on(tmp_path: Path, verb: str, name: str) -> None:
    key = next(key for key in recipe_fields(Recipe) if key == name or key.endswith(f".{name}"))
    folder = run_at(tmp_path / "run", **{"teacher" if key.startswith("teacher.") else "generator": 10})
    was = flat(load_recipe("digits", FULL).to_dict())[key]
    now = {"raise": was * 2, "lengthen": was * 2 + 1, "lower": was / 2, "clip": 1.0}[verb]
    assert changed(folder, f"{key}={now:g}") == {key: (was, now)}


@pytest.mark.parametrize(
    "change",
    [
        "distillation.micro_batch=16",
        "teacher.micro_batch=16",
        "log_kimg=1",
        "loop.samples=50",
        "metric=none",
        "loop.extractor=classifier",
        "precision=bf16-mixed",
        "distillation.duration_kimg=100",
        "distillation.evaluate_kimg=3",
        "trackers=[]",
        "published=elsewhere",
        "beta1=0.5",
        "schedule=[]",
    ],
)
def test_what_does_not_undo_training_may_change(tmp_path: Path, change: str) -> None:
    assert len(changed(run_at(tmp_path / "run", generator=10), change)) == (change != "schedule=[]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "objective.alpha=0.7",
            "objective.alpha=1.0, which a resumed run cannot change to 0.7; leave it at 1.0, or choose another --out",
        ),
        ("network.model_channels=64", "contains a run with network.model_channels=32, which a resumed run cannot change to 64"),
        ("distillation.batch=32", "contains a run with distillation.batch=64, which a resumed run cannot change to 32"),
        ("loop.seed=1", "contains a run with loop.seed=0, which a resumed run cannot change to 1"),
        ("distillation.ema_halflife_kimg=9", "ema_halflife_kimg=[8.0], which a resumed run cannot change to [9.0]"),
        (
            "schedule=[{until_kimg: 3, objective: {method: sid}}]",
            "contains a run with schedule[0].until_kimg=null, which a resumed run cannot change to 3.0",
        ),
        (
            "network.patch=2",
            "contains a run with network.patch=null, which a resumed run cannot change to 2; leave it at null, or choose",
        ),
        (
            "teacher=fashion-mnist-teacher",
            "teacher.bundle='', which a resumed run cannot change to fashion-mnist-teacher; leave it at '', or",
        ),
        ("data=fashion-mnist", "contains a run with data=digits, which a resumed run cannot change to fashion-mnist"),
        (
            "distillation.duration_kimg=2",
            "duration_kimg=2.0: the run has already trained for 6.4 kimg; give more than 6.4, or leave it at 44.8",
        ),
        (
            "teacher.learning_rate=1e-4",
            "the generator in {run} has already been started from the teacher, which was trained with 0.002",
        ),
        ("teacher.duration_kimg=500", "which was trained with 192.0; leave it at 192.0, or choose"),
    ],
)
def test_what_would_undo_training_is_refused_with_what_to_do(tmp_path: Path, change: str, message: str) -> None:
    folder = run_at(tmp_path / "run", teacher=1500, generator=100)
    with pytest.raises(RequestError) as refused:
        changed(folder, change)
    assert message.format(run=folder) in str(refused.value)


@pytest.mark.parametrize(("wrong", "key"), [("network.patch=2", "network.patch"), ("teacher=fashion-mnist-teacher", "teacher")])
def test_left_as_the_remedy_writes_it_a_run_goes_on(tmp_path: Path, wrong: str, key: str) -> None:
    folder = run_at(tmp_path / "run", teacher=100)
    with pytest.raises(RequestError) as refused:
        changed(folder, wrong)
    (value,) = re.findall(r"leave it at (\S+),", refused.value.remedy)
    assert changed(folder, f"{key}={value}") == {}


def test_a_discriminator_neither_comes_nor_goes(tmp_path: Path) -> None:
    folder, without = run_at(tmp_path / "run", generator=10), ["method=sid"]
    with pytest.raises(RequestError, match=r"adversarial_scale=0.0, which a resumed run cannot change to 0.1"):
        changed(folder, "adversarial_scale=0.1", base=without)
    assert changed(folder, "adversarial_scale=0.2") == {"objective.adversarial_scale": (0.1, 0.2)}


def test_what_is_trained_to_its_end_asks_to_be_lengthened_and_then_takes_new_rates(tmp_path: Path) -> None:
    folder = run_at(tmp_path / "run", generator=700)
    rate = "generator_learning_rate=1e-4"
    with pytest.raises(
        RequestError, match=r"is finished: it was trained for 44.8 kimg .*; lengthen distillation.duration_kimg too"
    ):
        changed(folder, rate)
    assert len(changed(folder, rate, "distillation.duration_kimg=90")) == 2


def test_a_phases_numbers_may_change_where_the_phases_stay(tmp_path: Path) -> None:
    folder = run_at(tmp_path / "run", generator=10)
    phase = "schedule=[{{until_kimg: {until}, objective: {{method: sid, tmin: {tmin}}}}}]"
    base, new = ([*FULL, phase.format(until=until, tmin=tmin)] for until, tmin in ((3, 10), (5, 20)))
    assert allowed_changes(folder, load_recipe("digits", base), load_recipe("digits", new)) == {
        "schedule[0].until_kimg": (3.0, 5.0),
        "schedule[0].objective.tmin": (10.0, 20.0),
    }


def test_another_path_to_the_same_data_is_the_same(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    for name, images in (("a", pixels), ("b", pixels), ("c", pixels[::-1])):
        np.savez(tmp_path / f"{name}.npz", arr_0=images, class_ids=np.arange(12) % 3)
    folder, base = run_at(tmp_path / "run", generator=10), [*FULL, f"data={tmp_path}/a.npz"]
    assert len(changed(folder, f"data={tmp_path}/b.npz", base=base)) == 1
    assert len(changed(folder, f"data={tmp_path}/../{tmp_path.name}/a.npz", base=base)) == 1
    with pytest.raises(RequestError, match="contains a run with data="):
        changed(folder, f"data={tmp_path}/c.npz", base=base)
    # A path that is gone cannot be compared; the remedy is a link, which works.
    (tmp_path / "a.npz").unlink()
    with pytest.raises(RequestError, match=rf"make {tmp_path}/a.npz lead to the data again") as refused:
        changed(folder, f"data={tmp_path}/b.npz", base=base)
    assert refused.value.exit_code == 2
    (tmp_path / "a.npz").symlink_to(tmp_path / "b.npz")
    assert len(changed(folder, f"data={tmp_path}/b.npz", base=base)) == 1


def test_another_path_to_the_same_teacher_is_the_same(tmp_path: Path, tiny_teacher: Bundle, digits_teacher: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher.path, copy)
    folder, base = run_at(tmp_path / "run", generator=10), [*FULL, f"teacher={tiny_teacher.path}"]
    assert len(changed(folder, f"teacher={copy}", base=base)) == 1
    with pytest.raises(RequestError, match=r"contains a run with teacher.bundle="):
        changed(folder, f"teacher={digits_teacher}", base=base)


def test_a_recipe_alone_claims_no_folder(tmp_path: Path) -> None:
    assert not holds_training(tmp_path / "nowhere")
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "run.lock").touch()
    assert not holds_training(tmp_path)
    assert saved_step(tmp_path, "teacher") == 0
    assert holds_training(run_at(tmp_path / "run", teacher=1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, digits_teacher: Path) -> tuple[list[str], Path]:
    """Settings of a short distillation, and the run that they end in."""
    settings = [line.replace("TEACHER", str(digits_teacher)) for line in TINY]
    out = tmp_path_factory.mktemp("runs") / "short"
    train(load_recipe("digits", settings), out)
    return settings, out


def test_an_extended_run_is_the_run_that_was_longer_from_the_start(tmp_path: Path, tiny: tuple[list[str], Path]) -> None:
    settings, short = tiny
    longer = [*settings, "distillation.duration_kimg=0.48"]
    train(load_recipe("digits", longer), tmp_path / "long")
    shutil.copytree(short, tmp_path / "short")
    more = (*longer, "log_kimg=0.064", "loop.grid=9")
    train(load_recipe("digits", more), tmp_path / "short")
    assert (
        Bundle.open(tmp_path / "short" / "generator").weights_sha256
        == Bundle.open(tmp_path / "long" / "generator").weights_sha256
    )

    lines = (tmp_path / "short" / "log.jsonl").read_text().splitlines()
    notes = [json.loads(line) for line in lines if "changed" in json.loads(line)]
    changes = {"distillation.duration_kimg": [0.32, 0.48], "loop.log_kimg": [0.032, 0.064], "loop.grid": [4, 9]}
    assert notes == [{"stage": "generator", "step": 10, "changed": changes}]
    assert yaml.safe_load((tmp_path / "short" / "recipe.yaml").read_text()) == load_recipe("digits", more).to_dict()
    # Readers of the log pass the note over, and the same command again changes nothing.
    assert all("changed" not in record.values for record in parse_history(lines)["generator"].records)
    assert read_history(tmp_path / "short" / "log.jsonl", {"generator": 32})["generator"].step == 15
    train(load_recipe("digits", more), tmp_path / "short")
    assert (tmp_path / "short" / "log.jsonl").read_text().splitlines() == lines


def test_a_finished_run_with_another_name_has_bundles_of_that_name(tmp_path: Path, tiny: tuple[list[str], Path]) -> None:
    settings, short = tiny
    shutil.copytree(short, tmp_path / "run")
    (tmp_path / "run" / "generator" / "engines").mkdir()  # engines belong to the weights, which stay
    before = Bundle.open(tmp_path / "run" / "generator")
    bundle = train(load_recipe("digits", [*settings, "name=sevens"]), tmp_path / "run")
    assert (before.spec.name, bundle.spec.name) == ("digits", "sevens")
    assert Bundle.open(tmp_path / "run" / "generator").spec == bundle.spec
    recipes = [found.spec.provenance["recipe"] for found in (before, bundle)]
    assert recipes[1] == {**recipes[0], "name": "sevens"}
    assert bundle.weights_sha256 == before.weights_sha256
    assert bundle.reference() is not None
    assert (bundle.path / "engines").is_dir()
    cards = [(run / "generator" / "README.md").read_text() for run in (short, tmp_path / "run")]
    assert cards[1] != cards[0]
    assert cards[1].replace("sevens", "digits") == cards[0]


def test_a_changed_rate_and_moment_are_the_ones_that_train(tmp_path: Path, tiny: tuple[list[str], Path]) -> None:
    """The state brings an optimizer's settings with it; the recipe's win."""
    settings, short = tiny
    weights = {}
    for change in ("beta2=0.999", "beta2=0.5", "generator_learning_rate=0"):
        out = tmp_path / change
        shutil.copytree(short, out)
        train(load_recipe("digits", [*settings, "distillation.duration_kimg=0.352", change]), out)
        weights[change] = Bundle.open(out / "generator").weights_sha256
    assert len(set(weights.values())) == 3


def test_another_metric_begins_anew_with_the_best(tmp_path: Path, tiny: tuple[list[str], Path]) -> None:
    """Without a metric the best value is 0, which no distance falls below."""
    settings, short = tiny
    shutil.copytree(short, tmp_path / "run")
    more = ["metric=FD", "loop.extractor=classifier", "loop.samples=50", "distillation.duration_kimg=0.352"]
    before = Bundle.open(tmp_path / "run" / "generator").weights_sha256
    train(load_recipe("digits", [*settings, *more]), tmp_path / "run")
    assert Bundle.open(tmp_path / "run" / "generator").weights_sha256 != before
