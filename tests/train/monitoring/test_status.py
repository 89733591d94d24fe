"""A run's status, from its files alone: right for every way a run can be, and without a trace; one process a run."""

import errno
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.machine import call_cli, run_cli
from builders.plans import TINY
from builders.runs import start_cli, wait_for_step
from uni_instruct.errors import RequestError
from uni_instruct.train.monitoring.status import read_status, resume_command
from uni_instruct.train.monitoring.status_text import duration, status_text
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.run_lock import LOCK, RunLock, is_locked, read_run_process

SETTINGS = [
    *TINY,
    "metric=none",
    "teacher.duration_kimg=0.2",
    "log_kimg=0.008",
    "state_kimg=0.04",
    "loop.grid=4",
    "loop.samples=4",
    "loop.report=false",
]
FD = "FD(digits-classifier)"


def train_command(out: Path, *options: str) -> list[str]:
    return ["train", "digits", "--out", str(out), "--set", *SETTINGS, *options]


def frozen_run(out: Path, stage: str, step: int, *options: str) -> subprocess.Popen[str]:
    """A training that has come past that step and then stands still, alive."""
    process = start_cli(*train_command(out, *options))
    wait_for_step(out, stage, step, process)
    process.send_signal(signal.SIGSTOP)
    return process


def ended(process: subprocess.Popen[str], sign: signal.Signals) -> None:
    process.send_signal(sign)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)


def status_of(run: Path) -> dict[str, Any]:
    done = call_cli("train", run, "--status", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_status_through_the_life_of_a_run(tmp_path: Path) -> None:
    """Running, killed, resumed by the command that the status gives, interrupted, finished; as nice as it was told to be."""
    out = tmp_path / "a run"
    process = frozen_run(out, "teacher", 12, "--nice", "7")
    threads = [int(thread.name) for thread in Path(f"/proc/{process.pid}/task").iterdir()]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {7}
    running = status_of(out)
    assert (running["state"], running["worker"]["pid"]) == ("running", process.pid)
    assert f"process {process.pid} on this machine holds run.lock" in running["known_by"]
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    teacher, generator = running["stages"]
    assert (teacher["step"], teacher["steps"]) == (logged[-1]["step"], 25)
    assert teacher["saved_step"] == teacher["step"] // 5 * 5
    assert (generator["step"], generator["steps"], generator["left_s"], running["left_s"]) == (0, 20, None, None)

    refused = call_cli(*train_command(out))
    assert refused.returncode == 2
    kill = f"wait until it has finished, or stop it with 'kill {process.pid}', or choose another --out"
    assert refused.stderr == f"error: {out} is being trained by process {process.pid} on this machine; {kill}\n"

    ended(process, signal.SIGKILL)
    killed = status_of(out)
    assert (killed["state"], killed["stages"][0]["step"]) == ("killed", teacher["step"])

    resumed = subprocess.Popen(["bash", "-c", f"exec {killed['resume']}"], stderr=subprocess.PIPE, text=True, cwd="/")
    wait_for_step(out, "generator", 3, resumed)
    ended(resumed, signal.SIGINT)
    interrupted = status_of(out)
    assert interrupted["state"] == "interrupted"
    teacher, generator = interrupted["stages"]
    assert (teacher["finished"], teacher["left_s"], generator["finished"]) == (True, 0.0, False)
    assert generator["saved_step"] == generator["step"] >= 3
    assert interrupted["left_s"] == pytest.approx((20 - generator["step"]) * 8 / generator["images_per_s"])

    done = call_cli(*train_command(out))
    assert done.returncode == 0, done.stderr
    finished = status_of(out)
    assert (finished["state"], finished["left_s"], finished["resume"]) == ("finished", 0.0, None)


@pytest.mark.slow
def test_two_processes_hold_one_lock_and_are_as_nice(tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = ("--devices", "2", "--nice", "7")
    process = frozen_run(out, "teacher", 3, *both)
    tasks = Path(f"/proc/{process.pid}/task")
    children = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    assert children
    for pid in (process.pid, *children):
        assert {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()} == {7}
    assert status_of(out)["worker"]["pid"] == process.pid
    assert "is being trained by process" in run_cli(*train_command(out), "--devices", "2").stderr
    ended(process, signal.SIGKILL)
    killed = status_of(out)
    assert killed["state"] == "killed"
    assert killed["resume"].endswith("--devices 2 --nice 7")
    assert run_cli(*train_command(out, *both)).returncode == 0
    assert status_of(out)["state"] == "finished"


def test_niceness_is_set_not_added() -> None:
    code = (
        "import os; from uni_instruct.train.commands.train import _lower_priority as lower\n"
        "lower(5); lower(5); lower(3); print(os.nice(0)); lower(6); print(os.nice(0))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "5\n6\n"


def test_a_system_without_niceness_refuses_it(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "nice")
    code, _, errors = cli("train", "digits", "--dry-run", "--nice", "5")
    assert (code, errors) == (2, "error: --nice is not supported on this system; leave it out\n")


def test_the_pipeline_itself_refuses_a_folder_that_is_taken(tmp_path: Path) -> None:
    """A second process that starts before the first has the lock gets past the command's own look at it."""
    from uni_instruct.train.pipeline import train

    with RunLock(tmp_path / "run") as other:
        assert other.acquire()
        with pytest.raises(
            RequestError, match="run is being trained by another process; wait until it has finished, or choose"
        ):
            train(load_recipe("digits", SETTINGS), tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]


def written_run(folder: Path, *overrides: str) -> Path:
    """A run as its files tell it: 20 of 25 steps of the teacher at 8 images each, 100 images/s, the last ten at 400."""
    recipe = load_recipe("digits", [*SETTINGS, "metric=FD", *overrides])
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    lines = [line("teacher", step, 100 if step <= 10 else 400, skipped_steps=step // 10) for step in range(1, 21)]
    for step, score in ((5, 3.0), (10, 1.5), (15, 2.0)):
        lines.insert(step, {"stage": "teacher", "step": step, "kimg": step * 0.008, FD: score, "precision": 0.5})
    lines.append({"stage": "teacher", "step": 20, "warning": "sick; turn a knob"})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    return folder


def line(stage: str, step: int, images_per_s: float, **values: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "kimg": step * 0.008,
        "loss": 0.5,
        **values,
        "images_per_s": images_per_s,
        "memory_mb": 9.0,
    }


def test_numbers_are_those_of_the_log(tmp_path: Path) -> None:
    status = read_status(written_run(tmp_path / "run"))
    teacher, generator = status.stages
    assert (teacher.step, teacher.steps, teacher.percent, teacher.skipped_steps) == (20, 25, 80.0, 2)
    assert teacher.images_per_s == pytest.approx(400)
    assert teacher.mean_images_per_s == pytest.approx(160 / (80 / 100 + 80 / 400))
    assert teacher.left_s == pytest.approx(5 * 8 / 400)
    assert (status.left_s, generator.step) == (None, 0)
    best = {"stage": "teacher", "step": 10, "kimg": 0.08, FD: 1.5, "precision": 0.5}
    assert teacher.best_scores is not None
    assert teacher.best_scores.to_dict() == best
    assert json.loads(json.dumps(status.to_dict()))["stages"][0]["best_scores"] == best
    assert teacher.last_scores is not None
    assert teacher.last_scores.step == 15
    assert [warning.warning for warning in status.warnings] == ["sick; turn a knob"]
    text = status_text(status)
    assert "teacher: step 20 of 25 (0.16 of 0.2 kimg, 80 %); 400 images/s at present, 160 over the stage; 0 s left" in text
    assert f"best scores at 0.08 kimg: {FD} 1.5, precision 0.5" in text
    assert "warning: teacher, step 20: sick; turn a knob" in text


def test_an_evaluation_between_two_lines_hides_no_images(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    scored = {"stage": "teacher", "step": 23, "kimg": 0.184, FD: float("nan")}
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(scored) + "\n" + json.dumps(line("teacher", 24, 32)) + "\n")
    teacher = read_status(run).stages[0]
    assert teacher.mean_images_per_s == pytest.approx(192 / (1 + 1))
    assert teacher.best_scores is not None
    assert teacher.best_scores.scores[FD] == 1.5, "what is not a number is not the best"


def test_a_given_teacher_is_no_stage(tmp_path: Path) -> None:
    status = read_status(written_run(tmp_path / "run", "teacher.bundle=digits"))
    assert [stage.name for stage in status.stages] == ["generator"]


@pytest.mark.parametrize(
    "tail",
    [json.dumps(line("teacher", 21, 1))[:end].encode() for end in (1, 30, 60, -3, -1)]
    + [b"\0" * 100, b"\xff\xfe", b"7", b'"a"'],
)
def test_a_half_written_last_line_is_passed_over(tmp_path: Path, tail: bytes) -> None:
    run = written_run(tmp_path / "run")
    whole = read_status(run).stages
    with (run / "log.jsonl").open("ab") as log:
        log.write(tail)
    assert read_status(run).stages == whole


def test_status_leaves_no_trace_and_loads_nothing_heavy(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    (run / LOCK).write_text("")
    before = {path: path.stat() for path in (run, *run.iterdir())}
    code = f"""
import os, sys
sys.modules.update(torch=None, numpy=None)
def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith({str(run)!r}):
        assert not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC), arguments
    assert not event.startswith(("os.mkdir", "os.rename", "os.remove", "os.utime", "os.truncate", "os.chmod")), event
sys.dont_write_bytecode = True
sys.addaudithook(watch)
sys.argv = ["uni-instruct", "train", {str(run)!r}, "--status"]
from uni_instruct.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 20 of 25" in done.stdout
    after = {path: path.stat() for path in before}
    assert {path: (s.st_mtime_ns, s.st_size) for path, s in after.items()} == {
        p: (s.st_mtime_ns, s.st_size) for p, s in before.items()
    }
    assert sorted(run.iterdir()) == sorted(path for path in before if path != run)


@pytest.mark.parametrize(
    ("host", "ended", "age_s", "state"),
    [
        ("elsewhere", None, 1, "probably running"),
        ("elsewhere", None, 3600, "probably stopped"),
        ("elsewhere", "interrupted", 1, "interrupted"),
        ("here", None, 1, "killed"),
        ("here", "failed: no disk; buy one", 1, "failed"),
        ("nobody's", None, 1, "probably running"),
        ("nobody's", None, 3600, "probably stopped"),
    ],
)
def test_state_of_a_run_whose_lock_nobody_holds(tmp_path: Path, host: str, ended: str | None, age_s: float, state: str) -> None:
    run = written_run(tmp_path / "run")
    if host != "nobody's":
        where = platform.node() if host == "here" else host
        note = {"pid": os.getpid(), "host": where, "started": 0.0, "cwd": "/there", "program": ["uni-instruct"], "devices": 1}
        (run / LOCK).write_text(json.dumps({**note, "nice": 0, "ended": ended}))
    for file in run.iterdir():
        os.utime(file, (time.time() - age_s,) * 2)
    status = read_status(run)
    assert status.state == state, "a pid that lives is another process's, on this machine or on that"
    if state == "failed":
        assert status.known_by.endswith(": no disk; buy one")
    if state.startswith("probably"):
        assert "by the time since the run last wrote" in status.known_by


def test_the_stage_that_a_running_process_is_at_is_not_called_not_begun(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    (run / "log.jsonl").write_text("")
    for file in run.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    stopped = status_text(read_status(run))
    with RunLock(run) as lock:
        assert lock.acquire()
        lock.note(devices=1)
        running = status_text(read_status(run))
    assert stopped.count("not started") == stopped.count("kimg) left") == 2
    assert "teacher: no log line yet, " in running
    assert "the time left is not known before the teacher's and the generator's first log line" in running
    assert "generator: not started, " in running


@pytest.mark.parametrize("damage", ["", "{", "[]", "7", '{"pid": 1}'])
def test_a_damaged_note_is_none(tmp_path: Path, damage: str) -> None:
    (tmp_path / LOCK).write_text(damage)
    assert read_run_process(tmp_path) is None


@pytest.mark.parametrize("devices", [1, 2])
def test_command_to_resume_is_quoted_and_says_where(devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process too: without a word the next call would take one a core, whose sums are others in their last digits."""
    run = tmp_path / "my run's"
    with RunLock(run) as lock:
        lock.acquire()
        lock.note(devices=devices)
    worker = read_run_process(run)
    assert worker is not None
    assert (worker.pid, worker.ended) == (os.getpid(), "finished")
    monkeypatch.chdir(tmp_path)
    niceness = ["--nice", str(worker.nice)] if worker.nice else []
    options = ["--devices", str(devices), *niceness]
    words = shlex.split(resume_command(run, worker))
    assert words[:3] == ["cd", worker.cwd, "&&"]
    assert words[3:] == [*worker.program, "train", f"{run}/recipe.yaml", "--out", str(run), *options]
    monkeypatch.chdir(worker.cwd)
    assert shlex.split(resume_command(run, worker))[0] == worker.program[0], "no need to go anywhere"
    assert resume_command(Path("run"), None) == "uni-instruct train run/recipe.yaml --out run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--status"], "'digits' is a recipe, not a run; give the folder that was given as --out"),
        (["nowhere", "--status"], "there is no run nowhere; give the folder that was given as --out; a training creates it"),
        (["empty", "--status"], "empty is not a run's folder: it has no recipe.yaml; give the folder that was given as --out"),
        (["run/teacher", "--status"], "run/teacher is not a run's folder: it has no recipe.yaml; give {root}/run"),
        ([".", "--status"], ". is not a run's folder: it has no recipe.yaml; give run"),
        (["run/recipe.yaml", "--status"], "run/recipe.yaml is a file, not the folder of a run; give the folder"),
        (
            ["digits", "--status", "--out", "run"],
            "--status takes no --out, because its argument (digits) is the run's folder; uni-instruct train run --status",
        ),
        (
            ["run", "--status", "--nice", "3"],
            "--status can only be combined with --json; uni-instruct train run --status",
        ),
        (["cut", "--status"], "cut/recipe.yaml has no valid teacher.duration_kimg or teacher.batch; give the folder of a run"),
        (["run", "--nice", "20"], "Invalid value for '--nice': 20 is not in the range 0<=x<=19."),
    ],
)
def test_bad_input_is_refused_in_one_line(
    cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (written_run(Path("run")) / "teacher").mkdir()
    for folder, text in (("empty", None), ("cut", "name: x\nteacher: {batch: 0}\n")):
        Path(folder).mkdir()
        if text:
            Path(folder, "recipe.yaml").write_text(text)
    if arguments[0] == ".":
        Path("cut", "recipe.yaml").unlink()
    code, output, errors = cli("train", *arguments)
    assert (code, output) == (2, "")
    assert message.format(root=tmp_path) in errors
    assert errors.count("\n") == 1


def test_one_process_at_a_time_holds_a_run(tmp_path: Path) -> None:
    with RunLock(tmp_path) as first, RunLock(tmp_path) as second:
        assert is_locked(tmp_path) is False
        assert first.acquire()
        assert is_locked(tmp_path) is True
        assert not second.acquire()
    with RunLock(tmp_path) as third:
        assert third.acquire()


def test_a_refused_recipe_leaves_the_note_of_the_run_alone(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        lock.acquire()
        lock.note(devices=3)
    before = (tmp_path / LOCK).read_bytes()
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert (tmp_path / LOCK).read_bytes() == before


def test_a_look_at_the_lock_keeps_no_training_out(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        release = threading.Timer(0.1, fcntl.flock, (looked_at, fcntl.LOCK_UN))
        release.start()
        with RunLock(tmp_path) as lock:
            assert lock.acquire()
        release.join()


def test_a_file_system_without_locks_trains_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    run = written_run(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(run) as lock:
        assert lock.acquire()
        lock.note(devices=1)
        assert "file system without file locks" in caplog.text
        assert is_locked(run) is None
        assert read_status(run).state == "probably running"
    assert read_status(run).state == "finished"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min"), (90000, "1 d 1 h"), (-5, "0 s")],
)
def test_durations_have_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words
