"""`lab --ray`: what a training writes on a node comes back whole, and a training whose actor dies goes on elsewhere."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.machine import run_cli
from builders.plans import TINY
from uni_instruct import __version__
from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.system.ray_cluster import contents
from uni_instruct.train.lab import ray_trainings
from uni_instruct.train.lab.processes import Training
from uni_instruct.train.lab.ray_trainings import TrainingActor, TrainingProgress, apply_progress, read_files
from uni_instruct.train.recipe import load_recipe

Cli = Callable[..., tuple[int, str, str]]
SMALL = (*TINY, "loop.samples=100", "loop.log_kimg=0.016", "loop.state_kimg=0.016", "teacher.steps=4")
# What a training does to its folder, in the order in which an actor is asked for news.
WRITES = """
import pathlib, sys, time
run, go = map(pathlib.Path, sys.argv[1:])
def wait(n):
    while not (go / str(n)).exists(): time.sleep(0.01)
(run / "state").mkdir(parents=True, exist_ok=True)
(run / "run.lock").write_text("mine"); (run / ".half.tmp").write_text("half")
(run / "log.jsonl").write_text("1\\n"); (run / "state" / "old.pt").write_bytes(b"old"); wait(1)
(run / "log.jsonl").write_text("1\\n2\\n"); (run / "state" / "old.pt").unlink(); (run / "state" / "new.pt").write_bytes(b"new")
wait(2); print("done")
"""


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """One whose recipe has a teacher of this machine."""
    recipe = load_recipe("digits", SMALL)
    given = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, bundle="/here/teacher"))
    return Training(folder=tmp_path / "lab" / "run", recipe=given)


def test_what_is_written_on_a_node_comes_back(
    training: Training, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = list[Training]()

    def start(there: Training, jobs: int) -> "subprocess.Popen[bytes]":
        begun.append(there)
        with there.output.open("ab") as output:
            command = [sys.executable, "-c", WRITES, str(there.folder), str(tmp_path / "go")]
            return subprocess.Popen(command, stdout=output)

    monkeypatch.setattr(ray_trainings, "start_training", start)
    monkeypatch.setattr(ray_trainings, "_POLL_S", 0.1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "go").mkdir()
    before = {"recipe.yaml": yaml.safe_dump(training.recipe.to_dict()).encode(), "": b"earlier\n"}
    trainer = TrainingActor()
    trainer.begin(training, before, contents(tiny_bundle.path), __version__)
    there = begun[0]
    assert there.folder != training.folder
    # The teacher is where this node has it, in what is asked for and in what the run remembers.
    placed = there.recipe.teacher.bundle
    assert Bundle.open(placed).weights_sha256 == tiny_bundle.weights_sha256
    assert yaml.safe_load((there.folder / "recipe.yaml").read_text())["teacher"]["bundle"] == placed

    follow(trainer, training, lambda: (training.folder / "state" / "old.pt").exists())
    assert sorted(read_files(training)) == ["log.jsonl", "state/old.pt"]
    (tmp_path / "go" / "1").touch()
    follow(trainer, training, lambda: (training.folder / "state" / "new.pt").exists())
    assert read_files(training)["log.jsonl"] == b"1\n2\n"
    assert not (training.folder / "state" / "old.pt").exists()
    (tmp_path / "go" / "2").touch()
    follow(trainer, training, lambda: False)
    assert training.output.read_text() == "earlier\ndone\n"
    assert not there.folder.parent.exists()


def follow(trainer: TrainingActor, training: Training, until: Callable[[], bool]) -> None:
    """Keeps the news until something is there, or the training has ended."""
    while not until():
        news = trainer.progress()
        apply_progress(news, training)
        if news.exit_code is not None:
            assert news.exit_code == 0
            return


def test_the_teacher_s_path_comes_back_as_it_is_here(training: Training) -> None:
    there = training.recipe.to_dict()
    there["teacher"]["bundle"] = "/there/teacher"
    apply_progress(TrainingProgress({"recipe.yaml": yaml.safe_dump(there).encode()}, [], None), training)
    assert yaml.safe_load((training.folder / "recipe.yaml").read_text()) == training.recipe.to_dict()


def test_a_node_of_another_version_is_refused(training: Training) -> None:
    with pytest.raises(
        RequestError, match=rf"a node of the cluster has uni-instruct {__version__}, but this machine has 0\.0\.0"
    ):
        TrainingActor().begin(training, None, None, "0.0.0")


def test_without_the_extra_nothing_is_begun(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, errors = cli("lab", "digits", *SMALL, "--methods", "sid", "--out", tmp_path / "lab", "--ray")
    assert (code, errors.strip()) == (2, "error: package 'ray' is not installed; pip install 'uni-instruct[ray]'")
    assert not (tmp_path / "lab").exists()


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray of this machine that is not ours to start, and so one whose nodes might have another disk: its address."""
    ray = pytest.importorskip("ray")
    started: Any = ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    try:
        yield str(started.address_info["gcs_address"])
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lab_on_a_cluster_trains_the_weights_of_one_here(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("lab", "digits", *SMALL, "--methods", "sid", "--seeds", "0-1")
    here = run_cli(*words, "--out", str(tmp_path / "here"))
    assert here.returncode == 0, here.stderr
    kills, ended = list[int](), threading.Event()

    def kill() -> None:
        """Kills one actor, once a state of its training has come back."""
        state = tmp_path / "there" / "experiments" / "sid-seed0" / "state" / "generator.pt"
        while not ended.wait(0.1):
            alive = trainers()
            if state.exists() and alive and not kills:
                with contextlib.suppress(ProcessLookupError):  # it may have just ended
                    os.kill(alive[0], signal.SIGKILL)
                    kills.append(alive[0])

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with cluster() as address:
        killer = threading.Thread(target=kill)
        killer.start()
        code, _, errors = cli(*words, "--jobs", "2", "--ray", address, "--out", str(tmp_path / "there"))
        ended.set()
        killer.join()
    assert code == 0, errors
    assert kills
    for seed in (0, 1):
        weights = [
            Bundle.open(tmp_path / lab / "experiments" / f"sid-seed{seed}" / "generator").weights_sha256
            for lab in ("here", "there")
        ]
        assert weights[0] == weights[1]
    assert (tmp_path / "there" / "lab.html").exists()
    assert not list((tmp_path / "there").rglob("run.lock"))
    # Gone on with here, it finds everything done.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "there" / "experiments").rglob("model.safetensors")}
    assert run_cli(*words, "--out", str(tmp_path / "there")).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


def trainers() -> list[int]:
    """Processes of actors that train."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_bytes().startswith(b"ray::TrainingActor"):
                found.append(int(place.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lab_on_a_ray_of_its_own_writes_where_it_is_asked_to(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ("lab", "digits", *SMALL, "--methods", "sid", "--ray", "--out", "lab")
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "lab" / "experiments" / "sid-seed0" / "generator").spec.steps == 1
    assert time.time() > (tmp_path / "lab" / "lab.html").stat().st_mtime
