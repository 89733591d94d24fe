"""`generate --workers` and `--shard`: several processes write the bytes of one, whoever of them dies."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.machine import call_cli
from uni_instruct.bundle import Bundle
from uni_instruct.errors import MissingExtraError, RequestError, UniInstructError
from uni_instruct.sampling.pool import MAX_DEATHS, ImageJob, Task
from uni_instruct.sampling.process_pool import ProcessPool
from uni_instruct.sampling.shards import Part, Shard
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]
COUNT = 2500


def arguments(bundle: Bundle, out: Path, *more: str, count: int = COUNT) -> tuple[str, ...]:
    return ("generate", str(bundle.path), "--seeds", f"0-{count - 1}", "--out", str(out), *more)


def children_of(pid: int) -> list[int]:
    """Its worker processes; not Python's resource tracker."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"multiprocessing-fork" in command or b"spawn_main" in command:
            found.append(int(child))
    return found


def begun(bundle: Bundle, out: Path, *more: str, count: int = COUNT) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "uni_instruct", *arguments(bundle, out, *more, count=count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def alone(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out.npz"
    assert call_cli(*arguments(exported_bundle, out)).returncode == 0
    return out


def test_workers_write_the_bytes_of_one_process(exported_bundle: Bundle, alone: Path, tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli(*arguments(exported_bundle, tmp_path / "out.npz", "--workers", "2"))
    assert (code, out.strip()) == (0, f"{tmp_path / 'out.npz'} written: {COUNT} images of tiny by onnx-fp32")
    assert err.splitlines()[0] == f"generate: 0/{COUNT} images"
    assert err.splitlines()[-1].startswith(f"generate: {COUNT}/{COUNT} images, ")
    assert sha256(tmp_path / "out.npz") == sha256(alone)
    assert os.listdir(tmp_path) == ["out.npz"]


def test_a_worker_that_is_killed_is_replaced(exported_bundle: Bundle, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    run = begun(exported_bundle, out, "--workers", "1")
    killed = 0
    while killed < 2 and run.poll() is None:
        for pid in children_of(run.pid):
            # Once it holds a claim, so that it dies over a shard.
            if list(tmp_path.glob(".out.npz.partial/*.claim")):
                with contextlib.suppress(ProcessLookupError):  # it may have just ended with the set
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                    time.sleep(1)
        time.sleep(0.01)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert killed
    assert sha256(out) == sha256(alone)


def test_killed_as_a_whole_it_goes_on_and_leaves_no_worker(
    exported_bundle: Bundle, alone: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out.npz"
    run = begun(exported_bundle, out, "--workers", "2")
    while run.poll() is None and not list(tmp_path.glob(".out.npz.partial/*.npy")):
        time.sleep(0.01)
    workers = children_of(run.pid)
    run.kill()
    run.communicate()
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob(".out.npz.partial/*.npy")}
    assert kept
    assert len(workers) == 2
    for _ in range(600):  # they end with the shard that they were at
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            break
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert cli(*arguments(exported_bundle, out, "--workers", "2"))[0] == 0
    assert sha256(out) == sha256(alone)


@pytest.mark.slow
def test_workers_and_head_are_killed_twenty_times(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    rng, count = random.Random(7), 30_000
    assert cli(*arguments(exported_bundle, tmp_path / "truth.npz", count=count))[0] == 0
    truth, kills, sets = sha256(tmp_path / "truth.npz"), 0, 0
    while kills < 20:  # a fast machine may finish a set before, and begins another
        out = tmp_path / f"{sets}.npz"
        run = begun(exported_bundle, out, "--workers", "2", count=count)
        while kills < 20 and run.poll() is None:
            time.sleep(rng.uniform(0.5, 3))
            workers = children_of(run.pid) if run.poll() is None else []
            victim = run.pid if rng.random() < 0.25 else rng.choice(workers) if workers else None
            if victim is not None:
                with contextlib.suppress(ProcessLookupError):  # a worker may have just ended with the set
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
            if victim == run.pid:
                break
        run.communicate(timeout=600)
        if out.exists():
            assert sha256(out) == truth
            sets += 1
    out = tmp_path / f"{sets}.npz"
    assert cli(*arguments(exported_bundle, out, "--workers", "2", count=count))[0] == 0
    assert sha256(out) == truth


def test_parts_make_the_set_in_any_order_and_the_last_writes_it(
    exported_bundle: Bundle, alone: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out.npz"
    for number in (2, 3, 1):
        code, text, err = cli(*arguments(exported_bundle, out, "--shard", f"{number}/3"))
        assert code == 0, err
        assert ("written" if number == 1 else f"shard {number}/3 is done; the set is written when all shards are done") in text
        assert out.exists() == (number == 1)
    assert sha256(out) == sha256(alone)
    assert "was complete" in cli(*arguments(exported_bundle, out, "--shard", "2/3"))[1]
    assert os.listdir(tmp_path) == ["out.npz"]


def test_a_part_is_a_stretch_of_the_shards_and_none_is_left_out() -> None:
    shards = [Shard(start, start + 4) for start in range(0, 40, 4)]
    for count in (1, 3, 7, 10, 16):
        parts = [list(Part(number, count).of(shards)) for number in range(1, count + 1)]
        assert [shard for part in parts for shard in part] == shards
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/16", "--shard 0/16 is out of range; give 1/16 to 16/16"),
        ("17/16", "--shard 17/16 is out of range; give 1/16 to 16/16"),
        ("1/0", "--shard 1/0 is out of range; give 1/1, or leave it out"),
        ("3", "--shard '3' cannot be read; write it as 3/16"),
        ("-1/4", "--shard '-1/4' cannot be read; write it as 3/16"),
    ],
)
def test_parts_out_of_range_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        Part.parse(text)
    assert str(error.value) == message


def test_what_does_not_fit_together_is_one_line(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    base = ("generate", exported_bundle.path, "--seeds", "0-9")
    wrong = {
        ("--grid", "x.png", "--workers", "2"): "--workers, --ray and --shard need an output; give --out",
        ("--out", "x", "--grid", "x.png", "--shard", "1/2"): "--grid cannot be combined with --shard",
        ("--out", "x", "--workers", "0"): "0 is not in the range",
        ("--out", "x.tar"): "for tar shards a folder that ends in .wds",
    }
    for options, message in wrong.items():
        code, _, err = cli(*base, *options)
        assert (code, message in err) == (2, True), err


def test_another_bundle_s_begun_set_is_refused(exported_bundle: Bundle, tiny_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out.wds"
    assert cli(*arguments(exported_bundle, out, "--shard", "1/2"))[0] == 0
    code, _, err = cli("generate", "digits", "--seeds", f"0-{COUNT - 1}", "--out", out, "--shard", "2/2")
    assert code == 2
    assert "holds an unfinished run of another request" in err
    assert "other weights" in err


def test_a_task_that_kills_every_worker_is_given_up_and_named() -> None:
    with ProcessPool(DeadlyJob(), 1) as pool:
        while not pool.idle:
            pool.wait(1)
        pool.submit(Task(Shard(3, 7), np.arange(4), None))
        with pytest.raises(UniInstructError) as error:
            wait_for_ever(pool)
    assert str(error.value).startswith(f"{MAX_DEATHS} workers died while making images 3 to 6, the last from exit code 3; ")


def test_a_worker_s_error_is_the_user_s(tmp_path: Path) -> None:
    with ProcessPool(ImageJob(bundle=tmp_path, engine="onnx-fp32", batch=4), 1) as pool, pytest.raises(RequestError) as error:
        wait_for_ever(pool)
    assert "is not a bundle" in str(error.value) or "there is no bundle" in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_survive_the_way_from_a_worker() -> None:
    import pickle

    for error in (RequestError("a", remedy="b", param="c"), MissingExtraError("ray", extra="ray")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def wait_for_ever(pool: ProcessPool) -> None:
    while True:
        pool.wait(1)


class DeadlyJob:
    """Ends every process that works on it, as a task too large for the memory does."""

    def open(self) -> Callable[[Task], None]:
        return lambda task: os._exit(3)

    def paths(self) -> list[Path]:
        return []

    def with_paths(self, places: object) -> "DeadlyJob":
        return self
