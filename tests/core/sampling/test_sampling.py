"""Several processes make one set: nothing is lost or made twice, and the bytes are those of one process alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.bundles import random_bundle
from builders.paths import TESTS
from uni_instruct.bundle import Bundle
from uni_instruct.data import open_dataset
from uni_instruct.engine import open_engine
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.images import contact_sheet
from uni_instruct.sampling import SampleRequest, open_run, read_samples
from uni_instruct.sampling.shards import SHARD_BYTES, SHARD_IMAGES, Shard, Shards, images_per_shard
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]

WORKER = TESTS / "builders" / "sampling_worker.py"
FORMS = ("out", "out.npz", "out.zip")
COUNT, BATCH = 3500, 64
SEEDS = [9, 3, *range(10, 27)]
SHARDS = -(-COUNT // SHARD_IMAGES)


@contextmanager
def worker(bundle: Bundle, out: Path, name: str, stop_in_call: int = -1) -> Iterator["subprocess.Popen[str]"]:
    """A process that works on the set; it waits for ever in one of its engine calls, where it is told to."""
    log = out.parent / f"{name}.log"
    command = [sys.executable, str(WORKER), str(bundle.path), str(out), str(COUNT), str(BATCH), str(log), str(stop_in_call)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended_well(process: "subprocess.Popen[str]") -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def until(true: Callable[[], object], *processes: "subprocess.Popen[str]") -> None:
    while not true():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def made_by(out: Path, name: str) -> list[int]:
    """The first seed of every batch that a worker made, in order."""
    log = out.parent / f"{name}.log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def contents(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: sha256(file) for file in files}


def work_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


@pytest.fixture(scope="module")
def alone(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the set in every form, by one process."""
    folder = tmp_path_factory.mktemp("alone")
    seeds = list(range(COUNT))
    for form in FORMS:
        with open_run(request_of(exported_bundle, seeds), folder / form) as run:
            run.fill(open_engine(exported_bundle, "onnx"), Silent())
            run.finish()
    return folder


class Silent:
    def advance(self, amount: int, note: str | None = None) -> None:
        pass


def request_of(bundle: Bundle, seeds: list[int]) -> SampleRequest:
    class_ids = resolve_class_ids(bundle.spec, seeds)
    return SampleRequest(bundle=bundle, engine="onnx-fp32", seeds=seeds, class_ids=class_ids, batch=BATCH)


def test_two_processes_share_the_work(exported_bundle: Bundle, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    with worker(exported_bundle, out, "a") as first, worker(exported_bundle, out, "b") as second:
        ended_well(first)
        ended_well(second)
    made = made_by(out, "a") + made_by(out, "b")
    assert sorted(made) == list(range(0, COUNT, BATCH))
    assert contents(out) == contents(alone / "out.npz")
    assert not work_folder(out).exists()


@pytest.mark.parametrize("form", ["out.npz", *(pytest.param(form, marks=pytest.mark.slow) for form in ("out", "out.zip"))])
def test_a_killed_process_s_shard_is_taken_over(form: str, exported_bundle: Bundle, alone: Path, tmp_path: Path) -> None:
    """One process stops in the middle of its first shard and is killed when the other has nothing left but to wait for it."""
    out = tmp_path / form
    folder = work_folder(out)
    with worker(exported_bundle, out, "dies", stop_in_call=5) as dies:
        until(lambda: len(made_by(out, "dies")) == 5, dies)
        with worker(exported_bundle, out, "lives") as lives:
            until(lambda: len(list(folder.glob("*.npy"))) == SHARDS - 1, dies, lives)
            shards = contents(folder)
            assert "000000000.npy" not in shards
            dies.send_signal(signal.SIGKILL)
            dies.wait()
            ended_well(lives)
    assert made_by(out, "dies") == [0, 64, 128, 192, 256]
    # Each once, those of the killed process too, and last.
    assert sorted(made_by(out, "lives")) == list(range(0, COUNT, BATCH))
    assert made_by(out, "lives")[-SHARD_IMAGES // BATCH :] == list(range(0, SHARD_IMAGES, BATCH))
    assert contents(out) == contents(alone / form)
    assert not folder.exists()


def test_processes_that_were_all_killed_are_followed_by_others(exported_bundle: Bundle, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    with (
        worker(exported_bundle, out, "a", stop_in_call=20) as first,
        worker(exported_bundle, out, "b", stop_in_call=20) as second,
    ):
        until(lambda: len(made_by(out, "a")) == 20 and len(made_by(out, "b")) == 20, first, second)
    done = {file.name for file in work_folder(out).glob("*.npy")}
    assert len(done) == 2 * (20 // 16)
    with worker(exported_bundle, out, "c") as third:
        ended_well(third)
    assert len(made_by(out, "c")) == len(range(0, COUNT, BATCH)) - 16 * len(done)
    assert contents(out) == contents(alone / "out.npz")


def test_one_that_has_a_run_to_itself_does_not_share_it(exported_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    request = request_of(exported_bundle, list(range(8)))
    for first, second in ((False, True), (True, False)):
        with open_run(request, out, shared=first), pytest.raises(RequestError, match="another process is writing"):  # noqa: SIM117
            with open_run(request, out, shared=second):
                pass
    with open_run(request, out, shared=True), open_run(request, out, shared=True):
        pass
    assert os.listdir(tmp_path) == []


def test_who_comes_when_all_is_done_makes_nothing(exported_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    request = request_of(exported_bundle, list(range(8)))
    with open_run(request, out, shared=True) as late:
        with open_run(request, out, shared=True) as run:
            run.fill(open_engine(exported_bundle, "onnx"), Silent())
            run.finish()
        made = out.stat().st_mtime_ns
        assert work_folder(out).exists()  # the other is still in it
        assert late.done == 8
        late.finish()
    with open_run(request, out, shared=True) as later:
        assert later.done == 8
        later.finish()
    assert out.stat().st_mtime_ns == made
    assert os.listdir(tmp_path) == ["out.npz"]


def test_a_shard_has_whole_batches_and_fixed_ranges(tiny_bundle: Bundle, tiny_teacher: Bundle) -> None:
    assert images_per_shard(tiny_bundle.spec, 64) == SHARD_IMAGES
    assert images_per_shard(tiny_bundle.spec, 24) == 1032
    assert images_per_shard(tiny_bundle.spec, 4096) == 4096
    assert images_per_shard(tiny_teacher.spec, 1) == min(SHARD_IMAGES, SHARD_BYTES // (64 * tiny_teacher.spec.steps))


def test_claims_exclude_each_other_and_end(tmp_path: Path) -> None:
    first, second = (Shards(tmp_path, (2, 2, 1), np.dtype(np.uint8), 10, 4) for _ in range(2))
    assert first.missing() == [Shard(0, 4), Shard(4, 8), Shard(8, 10)]
    with first.claimed(Shard(4, 8)) as mine, second.claimed(Shard(4, 8)) as also, second.claimed(Shard(8, 10)) as other:
        assert (mine, also, other) == (True, False, True)
    with second.claimed(Shard(4, 8)) as mine:
        assert mine
        second.write(Shard(4, 8), np.full((4, 2, 2, 1), 7, np.uint8))
    with first.claimed(Shard(4, 8)) as mine:
        assert not mine
    assert first.missing() == [Shard(0, 4), Shard(8, 10)]
    assert [path.name for path in tmp_path.glob("*4.*")] == ["000000004.npy"]
    np.testing.assert_array_equal(first.read(np.array([5, 7])), np.full((2, 2, 2, 1), 7, np.uint8))
    with pytest.raises(FileFormatError, match=r"000000000\.npy was removed while it was in use"):
        first.read(np.array([1]))


def test_floats_are_kept_as_they_are(tmp_path: Path) -> None:
    """The place of a VAE's latents: what the shards hold is never clipped or rounded."""
    shards = Shards(tmp_path, (2, 2, 4), np.dtype(np.float32), 5, 3)
    values = np.random.default_rng(0).normal(size=(5, 2, 2, 4)).astype(np.float32)
    for shard in reversed(shards.missing()):
        shards.write(shard, values[shard.rows])
    np.testing.assert_array_equal(shards.read(np.array([4, 0, 3, 1, 2])), values[[4, 0, 3, 1, 2]])


@pytest.fixture
def finished(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> tuple[Path, tuple[str, ...]]:
    """A folder with a bundle and its finished set in every form; and what to generate it with, form and --out left out."""
    shutil.copytree(exported_bundle.path, tmp_path / "bundle")
    arguments = ("generate", str(tmp_path / "bundle"), "--seeds", "9,3,10-26")
    for form in FORMS:
        assert cli(*arguments, "--out", tmp_path / form)[0] == 0
    return tmp_path, arguments


def test_a_finished_set_is_read_and_no_engine_loaded(finished: tuple[Path, tuple[str, ...]], cli: Cli) -> None:
    folder, arguments = finished
    images = read_samples(folder / "out.npz").images
    shutil.rmtree(folder / "bundle" / "engines")
    for form in FORMS:
        for engine in ((), ("--engine", "onnx"), ("--engine", "onnx-fp32")):
            code, output, errors = cli(*arguments, *engine, "--out", folder / form, "--grid", folder / "grid.png")
            assert (code, errors) == (0, "")
            assert "was complete: 19 images of tiny by onnx-fp32" in output
            assert (np.asarray(Image.open(folder / "grid.png")) == contact_sheet(images)[:, :, 0]).all()
    # It was read, not made anew: a pixel that was changed since shows.
    picture = folder / "out" / "000009.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    assert cli(*arguments, "--out", folder / "out", "--grid", folder / "grid.png")[0] == 0
    images[0] = 0
    assert (np.asarray(Image.open(folder / "grid.png")) == contact_sheet(images)[:, :, 0]).all()


def test_shards_that_are_all_done_need_no_engine(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    bundle = Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))
    out, request = tmp_path / "out.npz", request_of(bundle, list(range(70)))
    with open_run(request, out) as run:
        run.fill(open_engine(bundle, "onnx"), Silent())  # and then it was killed
    shutil.rmtree(bundle.path / "engines")
    code, output, _ = cli("generate", bundle.path, "--seeds", "0-69", "--out", out)
    assert (code, "written: 70 images of tiny by onnx-fp32" in output) == (0, True)
    assert cli("generate", exported_bundle.path, "--seeds", "0-69", "--out", tmp_path / "again.npz")[0] == 0
    assert out.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_a_set_that_was_begun_keeps_its_engine(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    """An engine that is exported meanwhile, and preferred from then on, does not make half of a set."""
    bundle = Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))
    shutil.move(bundle.path / "engines", tmp_path / "engines")
    assert cli("generate", bundle.path, "--seeds", "0-5", "--out", tmp_path / "out")[0] == 0
    shutil.move(tmp_path / "engines", bundle.path / "engines")
    assert (
        "was complete: 6 images of tiny by torch-fp32"
        in cli("generate", bundle.path, "--seeds", "0-5", "--out", tmp_path / "out")[1]
    )
    code, _, errors = cli("generate", bundle.path, "--seeds", "0-5", "--out", tmp_path / "out", "--engine", "onnx")
    assert (code, "engine torch-fp32 there, onnx-fp32 here" in errors) == (2, True)


@pytest.mark.parametrize("form", FORMS)
def test_a_set_is_read_back(form: str, finished: tuple[Path, tuple[str, ...]]) -> None:
    folder, _ = finished
    seeds = SEEDS
    samples = read_samples(folder / form)
    engine = open_engine(folder / "bundle", "onnx")
    assert samples.seeds.tolist() == seeds
    np.testing.assert_array_equal(samples.images, generate_images(engine, seeds))
    np.testing.assert_array_equal(samples.class_ids, resolve_class_ids(engine.spec, seeds))  # type: ignore[arg-type]
    assert samples.request["engine"] == "onnx-fp32"
    samples.images[0] = 0  # the caller's own
    first = read_samples(folder / form, count=4)
    assert first.seeds.tolist() == seeds[:4]
    assert len(first.images) == 4
    assert len(first.class_ids) == 4  # type: ignore[arg-type]
    # As data it has no note: the record beside the images is not a skipped file.
    assert "skipped" not in open_dataset(str(folder / form)).note


def test_colour_without_classes_is_read_back(tmp_path: Path, cli: Cli) -> None:
    bundle = random_bundle(tmp_path / "colour", seed=4, num_classes=0, image_shape=(3, 12, 8))
    images = generate_images(open_engine(bundle), [3, 1])
    for form in FORMS:
        assert cli("generate", bundle.path, "--seeds", "3,1", "--out", tmp_path / form)[0] == 0
        samples = read_samples(tmp_path / form)
        np.testing.assert_array_equal(samples.images, images)
        assert samples.class_ids is None


def test_a_set_whose_shards_are_not_all_done_is_said_to_be_unfinished(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random_bundle(Path("bundle"), 1)
    request = ("generate", "bundle", "--seeds", "0-1024", "--engine", "torch", "--out", "set")
    assert cli(*request, "--shard", "1/2")[0] == 0
    status, _, error = cli("evaluate", "set", "--reference", "digits")
    assert status == 2
    assert error.startswith("error: the samples of set are not finished: the shards made so far are in ")
    with pytest.raises(
        RequestError, match=r"not finished: the shards made so far are in .*; run the same 'generate' again, without --shard"
    ):
        read_samples("set")
    assert cli(*request)[0] == 0
    assert len(read_samples("set").images) == 1025


def test_what_is_no_set_is_refused(finished: tuple[Path, tuple[str, ...]]) -> None:
    folder, _ = finished
    with pytest.raises(RequestError, match=r"there are no samples at .*nothing; give what 'generate --out' wrote"):
        read_samples(folder / "nothing")
    (folder / "out" / "samples.json").unlink()
    (folder / "out.zip").write_bytes((folder / "out.zip").read_bytes()[:200])
    np.savez(folder / "out.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    reasons = {"out": "holds no samples that can be read", "out.npz": "holds no samples", "out.zip": "is not a whole zip"}
    for form, reason in reasons.items():
        with pytest.raises(FileFormatError, match=reason):
            read_samples(folder / form)
    assert json.loads((folder / "out" / "dataset.json").read_text())["num_classes"] == 10
