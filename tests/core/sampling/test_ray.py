"""`--ray`: actors of a real local Ray make the bytes of one process, whoever of them is killed."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.sampling.pool import ImageJob, Task
from uni_instruct.sampling.shards import Shard
from uni_instruct.system.ray_cluster import contents, unpack_files

Cli = Callable[..., tuple[int, str, str]]
COUNT, SHARD = 6000, 512


def actors() -> list[int]:
    """Processes of this package's actors."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::Actor"):
            found.append(int(place.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_are_killed_at_random_and_the_images_are_the_same() -> None:
    pytest.importorskip("ray")
    from uni_instruct.sampling.ray_pool import RayPool

    bundle, seeds = Bundle.open("digits"), np.arange(COUNT)
    class_ids = resolve_class_ids(bundle.spec, seeds)
    assert class_ids is not None
    left = [Shard(start, min(start + SHARD, COUNT)) for start in range(0, COUNT, SHARD)]
    total, made, kills, ended = len(left), dict[int, np.ndarray](), list[int](), threading.Event()

    def kill() -> None:
        rng = random.Random(1)
        while not ended.wait(rng.uniform(0.5, 3)) and len(kills) < 4:
            if alive := actors():
                victim = rng.choice(alive)
                with contextlib.suppress(ProcessLookupError):  # it may have just ended
                    os.kill(victim, signal.SIGKILL)
                    kills.append(victim)

    with RayPool(ImageJob(bundle=bundle.path, engine="onnx-fp32", batch=64), 2) as pool:
        killer = threading.Thread(target=kill)
        killer.start()
        while len(made) < total:
            while left and pool.idle:
                shard = left.pop(0)
                pool.submit(Task(shard, seeds[shard.rows], class_ids[shard.rows]))
            for shard, images in pool.wait(0.5):
                assert shard.start not in made
                made[shard.start] = images
        ended.set()
        killer.join()
    assert kills
    truth = generate_images(open_engine(bundle, "onnx"), seeds)
    np.testing.assert_array_equal(np.concatenate([made[start] for start in sorted(made)]), truth)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_teacher_is_sampled_by_actors_as_by_one_process(tiny_teacher: Bundle, tmp_path: Path, cli: Cli) -> None:
    """In as many steps as asked for: the bytes of its images, and their scores of several shards."""
    pytest.importorskip("ray")
    written = []
    for name, more in (("alone.npz", ()), ("shared.npz", ("--ray", "--workers", "2"))):
        words = ("--seeds", "0-1299", "--steps", "3", "--batch", "64", "--out", tmp_path / name)
        assert cli("generate", tiny_teacher.path, *words, *more)[0] == 0
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    scores = []
    for more in ((), ("--ray", "--workers", "2")):
        words = ("--reference", "digits", "--seeds", "0-1299", "--steps", "3", "--metrics", "fd,pr", "--json")
        code, out, _ = cli("evaluate", tiny_teacher.path, *words, *more)
        assert code == 0
        scores.append(json.loads(out)["scores"])
    assert scores[0] == scores[1]


def test_actors_of_a_node_place_a_bundle_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find nothing there, and the one that is done later must leave alone what the other reads by then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = Bundle.open("digits")
    sent = contents(bundle.path)
    seen, both_wait, write = list[int](), threading.Barrier(2), Path.write_bytes

    def write_when_both_are_here(path: Path, content: bytes) -> int:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_wait.wait(timeout=10)  # both have looked, and found nothing
        return write(path, content)

    def place() -> None:
        found = unpack_files(sent)
        seen.append(found.stat().st_ino)
        assert Bundle.open(found).weights_sha256 == bundle.weights_sha256

    monkeypatch.setattr(Path, "write_bytes", write_when_both_are_here)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(place) for _ in range(2)]:
            done.result()
    monkeypatch.undo()
    assert seen[0] == seen[1]
    stays = tmp_path / "uni-instruct" / "ray" / sent[0]
    assert stays.stat().st_ino == seen[0]
    assert [folder.name for folder in stays.parent.parent.iterdir()] == [stays.parent.name]


def test_where_no_cluster_is_one_line_says_so(tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("ray")
    code, _, err = cli("generate", "digits", "--seeds", "0-9", "--out", tmp_path / "out", "--ray", "127.0.0.1:1")
    assert code == 2
    assert "there is no Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused; give its HOST:PORT" in err
    assert (
        "that is not HOST:PORT" in cli("generate", "digits", "--seeds", "0", "--out", tmp_path / "out", "--ray", "nowhere")[2]
    )


def test_without_the_extra_the_error_names_it(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (
        ("generate", "digits", "--seeds", "0-9", "--out", tmp_path / "out"),
        ("evaluate", "digits", "--reference", "digits"),
    ):
        code, _, err = cli(*command, "--ray")
        assert (code, err.strip()) == (2, "error: package 'ray' is not installed; pip install 'uni-instruct[ray]'")
