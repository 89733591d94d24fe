"""Training as a user runs it: a killed run, resumed, ends in the bytes of one that was not; bad recipes are refused first."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.machine import call_cli, files_of_at_most, run_cli
from builders.runs import start_cli, wait_for_step
from uni_instruct.bundle import Bundle
from uni_instruct.train.loop import metric_value
from uni_instruct.train.recipe import built_in_recipes, load_recipe

# What a log says of the machine, not of the run.
MACHINES = ("images_per_s", "memory_mb")
TINY = [
    "network.model_channels=16",
    "network.channel_mult=[1]",
    "network.attn_resolutions=[8]",
    "teacher.batch=32",
    "teacher.duration_kimg=0.64",
    "teacher.steps=4",
    "teacher.warmup_kimg=0.1",
    "teacher.decay_kimg=0.3",
    "distillation.batch=32",
    "distillation.duration_kimg=0.64",
    "critic_warmup_kimg=0.1",
    "distillation.evaluate_kimg=0.32",
    "divergence=forward-kl",
    "ratio_mean=running",
    "distillation.ema_power_std=0.1",
    "snapshot_kimg=0.32",
    "loop.samples=100",
    "loop.log_kimg=0.032",
    "loop.state_kimg=0.16",
    "loop.report=false",
]


def train_command(out: Path, *overrides: str) -> list[str]:
    sets = [word for override in (*TINY, *overrides) for word in ("--set", override)]
    return ["train", "digits", "--out", str(out), *sets]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = call_cli(*train_command(out))
    assert done.returncode == 0, done.stderr
    return out


def test_run_folder_holds_what_a_user_needs(finished: Path) -> None:
    teacher, generator = Bundle.open(finished / "teacher"), Bundle.open(finished / "generator")
    assert (teacher.spec.steps, generator.spec.steps) == (4, 1)
    assert (teacher.reference() is None, generator.reference() is None) == (True, False)
    assert generator.spec.provenance["teacher_sha256"] == teacher.weights_sha256
    assert "digits" in (generator.path / "README.md").read_text()
    assert any((finished / "tensorboard").iterdir())
    assert any((finished / "samples").glob("generator-*.png"))
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"teacher", "generator"}
    assert any("FD(digits-classifier)" in record for record in records)


@pytest.mark.parametrize(
    ("stage", "sign"),
    [
        pytest.param("teacher", signal.SIGINT, id="teacher interrupted"),
        pytest.param("generator", signal.SIGKILL, id="generator killed"),
        pytest.param("teacher", signal.SIGKILL, id="teacher killed", marks=pytest.mark.slow),
        pytest.param("generator", signal.SIGINT, id="generator interrupted", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_is_the_uninterrupted_run(finished: Path, tmp_path: Path, stage: str, sign: signal.Signals) -> None:
    out = tmp_path / "run"
    process = start_cli(*train_command(out))
    wait_for_step(out, stage, step=7, process=process)
    process.send_signal(sign)
    process.communicate(timeout=60)
    assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL)

    done = call_cli(*train_command(out))
    assert done.returncode == 0, done.stderr
    for bundle in ("teacher", "generator"):
        assert (out / bundle / "model.safetensors").read_bytes() == (finished / bundle / "model.safetensors").read_bytes()
    assert timeless_log(out) == timeless_log(finished)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_two_processes_stop_together_and_go_on_as_if_they_had_not(tmp_path: Path, sign: signal.Signals) -> None:
    """The signal reaches the first process alone."""
    both = ("--devices", "2")
    assert run_cli(*train_command(tmp_path / "whole"), *both).returncode == 0
    process = start_cli(*train_command(tmp_path / "run"), *both)
    wait_for_step(tmp_path / "run", "generator", step=7, process=process)
    process.send_signal(sign)
    process.communicate(timeout=60)  # waits for the second too, which holds the same pipes

    assert run_cli(*train_command(tmp_path / "run"), *both).returncode == 0
    weights = [(tmp_path / run / "generator" / "model.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]
    assert timeless_log(tmp_path / "run") == timeless_log(tmp_path / "whole")


def test_finished_run_is_left_as_it_is(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file() and path.name != "run.lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert call_cli(*train_command(finished)).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_generator_starts_from_a_given_teacher(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = (f"teacher.bundle={finished / 'teacher'}", "divergence=reverse-kl", "distillation.duration_kimg=0.32")
    assert call_cli(*train_command(out, *given)).returncode == 0
    assert not (out / "teacher").exists()
    spec = Bundle.open(out / "generator").spec
    assert spec.provenance["teacher_sha256"] == Bundle.open(finished / "teacher").weights_sha256


@pytest.mark.parametrize(("metric", "scored"), [("KD", {"KD(digits-classifier)", "precision", "recall"}), ("none", set())])
def test_weights_are_chosen_by_the_recipes_metric(finished: Path, tmp_path: Path, metric: str, scored: set[str]) -> None:
    out = tmp_path / "run"
    short = ("distillation.duration_kimg=0.32", "distillation.evaluate_kimg=0.16")
    given = (f"teacher.bundle={finished / 'teacher'}", f"loop.metric={metric}", "divergence=reverse-kl", *short)
    done = call_cli(*train_command(out, *given))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "precision" in record]
    assert all(scored <= record.keys() for record in evaluated)
    assert bool(evaluated) == bool(scored)
    best = torch.load(out / "state" / "generator.pt", weights_only=True)["best"]
    if metric == "none":
        assert best["step"] == 10
    else:
        assert best["value"] == min(record["KD(digits-classifier)"] for record in evaluated)


def test_a_metric_is_found_under_its_extractors_name() -> None:
    assert metric_value({"precision": 0.5, "FID": 3.0}, "FD") == metric_value({"FD(x-classifier)": 3.0}, "FD") == 3
    assert metric_value({"KID": 2.0, "FID": 3.0}, "KD") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "digits", "--set", "teacher.bundle=digits"],
            "is a one-step generator, not a diffusion model: it denoises from one noise level only",
        ),
        (["train", "imagenet"], "recipe 'imagenet' is unknown; give a YAML file or one of afhqv2-64, cifar10-cond"),
        (["train", "digits", "--set", "divergence=kl"], "divergence 'kl' is unknown; choose one of reverse-kl"),
        (
            ["train", "digits", "--set", "divergence=r**2"],
            "f(r) = r**2 is 1 at r = 1; subtract that value from f, so that f(1) = 0",
        ),
        (
            ["train", "digits", "--set", "method=gan"],
            "objective.method 'gan' is unknown; choose one of diff-instruct, dmd, dmd2",
        ),
        (
            ["train", "digits", "--set", "method=di++"],
            "method 'di++' needs a reward function, because objective.reward_scale is 1; --set reward=file.py:function",
        ),
        (["train", "digits", "--set", "method=di-star", "--set", "reward=nowhere:f"], "reward 'nowhere:f' cannot be imported"),
        (
            ["train", "digits", "--set", "data="],
            "the recipe names no data, which it needs to train the teacher; --set data=...",
        ),
        (["train", "digits", "--set", "precision=16-mixed"], "loop.precision 16-mixed needs a GPU"),
        (["train", "digits", "--set", "conditional=false", "--set", "method=sid-lsg"], "guidance needs a teacher with classes"),
        (
            ["train", "digits", "--set", "distillation.snapshot_kimg=1"],
            "--set key 'distillation.snapshot_kimg' is unknown; choose one of loop.snapshot_kimg, ",
        ),
        (
            ["train", "digits", "--set", "colour=red"],
            "--set key 'colour' is unknown; 'uni-instruct train --help-recipe' lists",
        ),
        (["train", "digits", "--set", "batch=64"], "--set key 'batch' is ambiguous; write teacher.batch or distillation.batch"),
        (["train", "digits", "--set", "alpha"], "--set alpha has no value; write --set key=value"),
        (["train", "digits", "--set", "alpha=high"], "recipe key 'objective.alpha' is 'high'; give a number"),
        (["train", "digits", "--set", "teacher.batch=0"], "teacher.batch 0 is out of range; give 1"),
        (["train", "digits", "--set", "channel_mult=[1,1,1,1,1]"], "resolution 8x8 is not divisible by 16"),
        (["train", "digits", "--set", "data=digit"], "there is no data set digit; give one of digits"),
        (["train", "digits", "--set", "teacher.bundle=nowhere"], "there is no bundle nowhere"),
    ],
)
def test_bad_recipe_is_refused_before_anything_is_written(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    code, _, errors = cli(*arguments, "--out", str(out))
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
def test_batch_that_the_processes_do_not_divide_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_cli("train", "digits", "--out", out, "--devices", "2", "--set", "distillation.batch=63")
    assert done.returncode == 2
    assert (
        "error: distillation.batch 63 cannot be divided among 2 processes; --set distillation.batch=64, or --devices 1\n"
        in done.stderr
    )
    assert not out.exists()


def test_generator_starts_from_another_where_one_is_given(finished: Path, tmp_path: Path) -> None:
    first, still = finished / "generator", ("generator_learning_rate=0", "distillation.duration_kimg=0.32", "method=sid")
    given = (f"teacher.bundle={finished / 'teacher'}", f"distillation.start={first}", *still)
    assert call_cli(*train_command(tmp_path / "run", *given)).returncode == 0
    started, other = Bundle.open(tmp_path / "run" / "generator").weights(), Bundle.open(first).weights()
    assert all((array == other[name]).all() for name, array in started.items())


def test_bfloat16_trains_to_about_the_same_losses(finished: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        given = (
            f"teacher.bundle={finished / 'teacher'}",
            "metric=none",
            "distillation.duration_kimg=0.16",
            f"precision={precision}",
        )
        more = ("critic_warmup_kimg=0", "channels_last=true", "distillation.micro_batch=24")
        done = call_cli(*train_command(tmp_path / precision, *given, *more))
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / precision / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["fake_score/loss"] for line in lines])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("role", ["teacher.bundle", "distillation.start"])
def test_networks_of_another_shape_are_refused(
    cli: Callable[..., tuple[int, str, str]], finished: Path, tiny_bundle: Bundle, tmp_path: Path, role: str
) -> None:
    np.savez(tmp_path / "made.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8))
    given = {"teacher.bundle": f"data={tmp_path}/made.npz", "distillation.start": f"distillation.start={tiny_bundle.path}"}[
        role
    ]
    code, _, errors = cli(*train_command(tmp_path / "run", f"teacher.bundle={finished / 'teacher'}", given))
    assert code == 2
    expected = {
        "teacher.bundle": "makes images of shape [1, 8, 8], data set 'made' holds [3, 16, 16]; give the data that the teacher",
        "distillation.start": f"distillation.start {tiny_bundle.path} has network_args",
    }[role]
    assert expected in errors
    assert not (tmp_path / "run").exists()


def test_another_recipe_into_the_same_run_is_refused(finished: Path) -> None:
    done = call_cli(*train_command(finished, "objective.alpha=0.7"))
    assert done.returncode == 2
    assert "contains a run with objective.alpha=0.5, which a resumed run cannot change to 0.7" in done.stderr


def test_corrupt_state_is_named(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "state").mkdir(parents=True)
    (out / "state" / "teacher.pt").write_bytes((finished / "state" / "teacher.pt").read_bytes()[:1000])
    done = call_cli(*train_command(out))
    assert done.returncode == 2
    assert "teacher.pt cannot be read; delete it to train that stage again" in done.stderr


def test_full_disk_ends_in_one_line_and_can_be_resumed(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with files_of_at_most(300_000):  # the bundles fit, a state does not
        done = call_cli(*train_command(out))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    limit = "raise the limit of 'ulimit -f', or write elsewhere"
    assert errors == [f"error: cannot write {out}/state/teacher.pt: File too large; {limit}"]
    assert [file.name for file in (out / "state").iterdir()] == ["data.json"]  # what the run is of, but no part of a state

    assert call_cli(*train_command(out)).returncode == 0
    assert (out / "generator" / "model.safetensors").read_bytes() == (finished / "generator" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", built_in_recipes())
def test_built_in_recipes_resolve_to_themselves(name: str, tmp_path: Path) -> None:
    import yaml

    recipe = load_recipe(name)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(str(copy)) == recipe


def timeless_log(out: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in MACHINES} for record in records]
