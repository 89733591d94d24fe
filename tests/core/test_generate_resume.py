"""An interrupted generate goes on where it was, and ends in the bytes of one that was never interrupted."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from builders.machine import call_cli, files_of_at_most
from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, open_engine
from uni_instruct.generate import resolve_class_ids
from uni_instruct.sampling import SampleRequest, open_run
from uni_instruct.system.files import sha256
from uni_instruct.system.progress import progress

Cli = Callable[..., tuple[int, str, str]]
FORMS = ("out", "out.npz", "out.zip")
COUNT, BATCH = 3000, 24  # three shards
MANY = 8000


def arguments(bundle: Bundle, out: Path, count: int = COUNT) -> list[str]:
    return ["generate", str(bundle.path), "--seeds", f"0-{count - 1}", "--batch", str(BATCH), "--out", str(out)]


def contents(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: sha256(file) for file in files}


def shards(work: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(work.glob("*.npy"))}


def interrupt(command: list[str], folder: Path, files: str, count: int, how: signal.Signals) -> int:
    """Starts the command and ends it once its work folder has that many files. Returns its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "uni_instruct", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and len(list(folder.glob(files))) < count:
        time.sleep(0.001)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert errors.decode().splitlines()[-1] == "error: interrupted; run the same command again to continue"
    return process.returncode


@pytest.mark.parametrize("form", ["out", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_interrupted_and_killed_runs_end_in_the_same_bytes(
    form: str, exported_bundle: Bundle, tmp_path: Path, cli: Cli
) -> None:
    whole, broken = tmp_path / "whole" / form, tmp_path / "broken" / form
    assert cli(*arguments(exported_bundle, whole, MANY))[0] == 0
    work = broken.with_name(f".{form}.partial")
    assert interrupt(arguments(exported_bundle, broken, MANY), work, "*.npy", 1, signal.SIGINT) == 130
    first = shards(work)
    assert not broken.exists()
    assert interrupt(arguments(exported_bundle, broken, MANY), work, "*.npy", 3, signal.SIGKILL) == -signal.SIGKILL
    second = shards(work)
    assert not broken.exists()
    # What the first run finished was not made again.
    assert len(second) > len(first) > 0
    assert all(second[name] == digest for name, digest in first.items())
    code, output, _ = cli(*arguments(exported_bundle, broken, MANY))
    assert (code, "written" in output) == (0, True)
    assert contents(broken) == contents(whole)
    assert os.listdir(broken.parent) == [form]


def test_a_run_that_is_killed_while_it_writes_the_set_is_finished(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    assert interrupt(arguments(exported_bundle, out, MANY), work, ".out.*.tmp/*.png", 9, signal.SIGKILL) < 0
    assert not out.exists()
    assert cli(*arguments(exported_bundle, out, MANY))[0] == 0
    assert len(list(out.glob("*.png"))) == MANY
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_is_killed_after_its_last_step_leaves_nothing(
    unfinished: Path, exported_bundle: Bundle, tmp_path: Path, cli: Cli
) -> None:
    out, saved = unfinished.with_name("out.npz"), tmp_path / "saved"
    shutil.copytree(unfinished, saved)
    assert cli(*arguments(exported_bundle, out))[0] == 0
    saved.rename(unfinished)  # as if it had not come to removing it
    assert "was complete" in cli(*arguments(exported_bundle, out))[1]
    assert os.listdir(tmp_path) == ["out.npz"]


class BreaksOff:
    """An engine that is interrupted at a call."""

    def __init__(self, engine: Engine, calls: int):
        self.spec, self.id, self.device = engine.spec, engine.id, engine.device
        self.mixes_classes = engine.mixes_classes
        self.engine, self.calls = engine, calls

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.engine(noise, class_ids)


@pytest.fixture
def unfinished(exported_bundle: Bundle, tmp_path: Path) -> Path:
    """The work folder of a run for `out.npz` that was interrupted in its third shard."""
    seeds = list(range(COUNT))
    class_ids = resolve_class_ids(exported_bundle.spec, seeds)
    request = SampleRequest(bundle=exported_bundle, engine="onnx-fp32", seeds=seeds, class_ids=class_ids, batch=BATCH)
    engine = BreaksOff(open_engine(exported_bundle), calls=100)
    with suppress(KeyboardInterrupt), open_run(request, tmp_path / "out.npz") as run, progress("", COUNT, "") as bar:
        run.fill(engine, bar)
    folder = tmp_path / ".out.npz.partial"
    assert sorted(shards(folder)) == ["000000000.npy", "000001032.npy"]
    return folder


@pytest.fixture(scope="module")
def whole(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of `out.npz` from a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out.npz"
    assert call_cli(*arguments(exported_bundle, out)).returncode == 0
    return out.read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def as_former(folder: Path) -> None:
    facts = json.loads((folder / "request.json").read_text())
    del facts["images_per_shard"]
    (folder / "request.json").write_text(json.dumps(facts | {"engine": "onnx"}))
    images = np.load(folder / "000001032.npy")
    np.save(folder / "000001032.npy", images[:480])
    np.save(folder / "000001512.npy", images[480:])


# What a crash of the machine, or a hand, left in the work folder.
CRASHES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "last shard cut": lambda folder: cut(folder / "000001032.npy"),
    "first shard cut": lambda folder: cut(folder / "000000000.npy"),
    "shard empty": lambda folder: (folder / "000001032.npy").write_bytes(b""),
    "shard missing": lambda folder: (folder / "000000000.npy").unlink(),
    "shard of floats": lambda folder: np.save(folder / "000001032.npy", np.zeros((24, 8, 8, 1))),
    "shard too long": lambda folder: np.save(folder / "000001032.npy", np.zeros((COUNT, 8, 8, 1), np.uint8)),
    "half-written file": lambda folder: (folder / ".000002064.npy.1.tmp").write_bytes(b"x"),
    "request lost": lambda folder: (folder / "request.json").unlink(),
    "request cut": lambda folder: (folder / "request.json").write_text("{"),
    # Of a version whose shards ended when some seconds had passed, and whose engines had no ids.
    "former shards": lambda folder: as_former(folder),
    "locks of a former version": lambda folder: [file.unlink() for file in folder.glob("*.lock")],
}


@pytest.mark.parametrize("crash", CRASHES)
def test_what_a_crash_left_is_made_good(crash: str, unfinished: Path, whole: bytes, exported_bundle: Bundle, cli: Cli) -> None:
    CRASHES[crash](unfinished)
    out = unfinished.with_name("out.npz")
    assert cli(*arguments(exported_bundle, out))[0] == 0
    assert out.read_bytes() == whole
    assert os.listdir(out.parent) == ["out.npz"]


def test_an_unfinished_run_is_not_mixed_with_another_request(
    unfinished: Path, whole: bytes, exported_bundle: Bundle, cli: Cli
) -> None:
    out, before = unfinished.with_name("out.npz"), contents(unfinished)
    for change, message in (
        (("--batch", "32"), "batch 24 there, 32 here"),
        (("--class", "2"), "other class_ids"),
        (("--engine", "torch"), "engine onnx-fp32 there, torch-fp32 here"),
        (("--seeds", "1-3000"), "other seeds, other class_ids"),
    ):
        code, _, errors = cli(*arguments(exported_bundle, out), *change)
        assert code == 2
        assert f"holds an unfinished run of another request ({message}); finish that" in errors
        assert errors.count("\n") == 1
        assert contents(unfinished) == before
    assert cli(*arguments(exported_bundle, out))[0] == 0
    assert out.read_bytes() == whole


def test_two_processes_do_not_write_the_same_set(unfinished: Path, exported_bundle: Bundle, cli: Cli) -> None:
    out, before = unfinished.with_name("out.npz"), contents(unfinished)
    holder = os.open(unfinished / "workers.lock", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    code, _, errors = cli(*arguments(exported_bundle, out))
    assert code == 2
    assert "another process is writing" in errors
    assert contents(unfinished) == before
    os.close(holder)
    assert cli(*arguments(exported_bundle, out))[0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_fills_up_costs_nothing_but_time(
    form: str, small_disk: Path, exported_bundle: Bundle, tmp_path: Path, cli: Cli
) -> None:
    """64 KiB hold no shard; 300 KiB hold the shards, but not the set beside them; then there is room."""
    out, work = small_disk / form, small_disk / f".{form}.partial"
    for size, kept in (("64k", 0), ("300k", 3)):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        code, _, errors = cli(*arguments(exported_bundle, out))
        assert code == 2
        assert "No space left on device; free space, or write elsewhere" in errors
        assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
        assert not out.exists()
        assert len(list(work.glob("*.npy"))) == kept
        assert work.exists() == bool(kept)
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert cli(*arguments(exported_bundle, out))[0] == 0
    assert cli(*arguments(exported_bundle, tmp_path / form))[0] == 0
    assert contents(out) == contents(tmp_path / form)
    assert os.listdir(small_disk) == [form]


def test_a_set_that_cannot_be_finished_keeps_its_images(
    whole: bytes, exported_bundle: Bundle, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out.npz"
    with files_of_at_most(100_000):  # enough for a shard, not for the set
        code, _, errors = cli(*arguments(exported_bundle, out))
    assert code == 2
    assert "cannot write" in errors
    assert len(shards(tmp_path / ".out.npz.partial")) == -(-COUNT // 1032)
    assert not out.exists()
    code, _, errors = cli(*arguments(exported_bundle, out))
    assert code == 0
    assert out.read_bytes() == whole
