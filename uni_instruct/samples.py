"""Sample sets: the images of many seeds as a folder of PNGs, an npz or a zip, written so that an interrupted run goes on.

Finished batches wait in a folder beside the output (`.NAME.partial`); the output appears whole, at the end.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine
from uni_instruct.errors import RequestError
from uni_instruct.files import atomic_file, disk_errors
from uni_instruct.generate import generate_batches, image_size
from uni_instruct.progress import Progress
from uni_instruct.sample_forms import SampleSet, finished_request, form_of, write_npy
from uni_instruct.spec import ModelSpec

REQUEST = "request.json"
# A shard is written after this many images or seconds, whatever comes first: that much is lost when a run is killed.
SHARD_IMAGES, SHARD_S = 1024, 5.0


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What is asked for. The batch size is part of it: some engines' last float bit depends on the batch."""

    bundle: Bundle
    engine: str
    seeds: list[int] = field(repr=False)
    class_ids: np.ndarray | None = field(repr=False)
    batch: int = 64

    @property
    def spec(self) -> ModelSpec:
        """What the generator is."""
        return self.bundle.spec

    def facts(self) -> dict[str, Any]:
        """What tells this request from another, for JSON."""
        labels = None if self.class_ids is None else _digest(self.class_ids)
        return {
            "generator": self.spec.name,
            "weights_sha256": self.bundle.weights_sha256,
            "engine": self.engine,
            "batch": self.batch,
            "images": len(self.seeds),
            "seeds_sha256": _digest(np.array(self.seeds, dtype=np.int64)),
            "class_ids_sha256": labels,
        }


class SampleRun:
    """A request on its way to `out`: `fill` generates what an interrupted run left to do, `finish` writes the set."""

    def __init__(self, request: SampleRequest, out: Path, shards: "Shards"):
        self.request = request
        self.out = out
        self.shards = shards

    @property
    def done(self) -> int:
        """Images that are generated already."""
        return self.shards.done

    def fill(self, engine: Engine, progress: Progress) -> None:
        """Generates the rest. Shards end where batches end, so a resumed run sees the batches of an unbroken one."""
        rest, request = slice(self.done, None), self.request
        class_ids = None if request.class_ids is None else request.class_ids[rest]
        waiting: list[np.ndarray] = []
        last_write = time.monotonic()
        for images in generate_batches(engine, request.seeds[rest], class_ids, request.batch):
            waiting.append(images)
            if len(waiting) * request.batch >= SHARD_IMAGES or time.monotonic() - last_write > SHARD_S:
                self.shards.append(np.concatenate(waiting))
                waiting, last_write = [], time.monotonic()
            progress.advance(len(images))
        if waiting:
            self.shards.append(np.concatenate(waiting))

    def first(self, count: int) -> np.ndarray:
        """The first images that are done, at most count: uint8 [N, H, W, C]."""
        return self.shards.read(np.arange(min(count, self.done)))

    def finish(self) -> None:
        """Writes the set whole. Raises DiskError where it cannot be written."""
        request = self.request
        samples = SampleSet(
            spec=request.spec,
            seeds=request.seeds,
            class_ids=request.class_ids,
            reader=self.shards,
            request=request.facts(),
        )
        # First among the shards: what a kill leaves half-written there goes when the run is done.
        staged = self.shards.folder / self.out.name
        form_of(self.out).write(samples, staged)
        with disk_errors(self.out):
            os.replace(staged, self.out)


@contextmanager
def open_run(request: SampleRequest, out: Path) -> Iterator[SampleRun]:
    """The request's run, at the point where an interrupted one left it. What is done survives a failure.

    Raises RequestError where `out` or its run hold another request or cannot hold this one, DiskError where nothing can
    be written.
    """
    form_of(out).check(request.spec, request.seeds)
    folder = _work_folder(out)
    with _claimed(folder, out):
        _check_same(folder, request)
        try:
            yield SampleRun(request, out, Shards(folder, image_size(request.spec), len(request.seeds)))
            shutil.rmtree(folder)
        finally:
            if not any(folder.glob("*.npy")):
                shutil.rmtree(folder, ignore_errors=True)


def is_finished(request: SampleRequest, out: Path) -> bool:
    """Whether `out` is this request's finished set, of which no work is then left.

    Raises RequestError where something else stands there.
    """
    with disk_errors(out):
        empty = not out.exists() or (out.is_dir() and form_of(out).is_folder and not any(out.iterdir()))
    if empty:
        return False
    found = finished_request(out)
    if found == request.facts():
        if _noted_request(_work_folder(out)) == found:  # the run was killed after its last step but one
            shutil.rmtree(_work_folder(out))
        return True
    holds = f"the images of another request ({_difference(found, request.facts())})" if found else "something else"
    raise RequestError(f"{out} holds {holds}", remedy="choose another --out or delete it", param="out")


class Shards:
    """The finished images of a request, in its order, as files of consecutive ones: uint8 [N, H, W, C] in all."""

    def __init__(self, folder: Path, size: tuple[int, int, int], total: int):
        self.folder = folder
        self.size = size
        self.total = total
        self._starts: list[int] = []
        self._open: tuple[int, np.ndarray] | None = None
        self.done = 0
        while self.done < total and (images := self._load(self.done)) is not None:
            self._starts.append(self.done)
            self.done += len(images)

    def __len__(self) -> int:
        return self.done

    def append(self, images: np.ndarray) -> None:
        """Adds the next images, on disk when this returns."""
        with atomic_file(self._path(self.done)) as partial, partial.open("wb") as file:
            write_npy(file, images.shape, [images])
        self._starts.append(self.done)
        self.done += len(images)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Those images, a fresh array; no more than the shards they lie in are read."""
        out = np.empty((len(indices), *self.size), dtype=np.uint8)
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        for owner in np.unique(owners):
            rows = owners == owner
            out[rows] = self._shard(int(owner))[np.asarray(indices)[rows] - self._starts[owner]]
        return out

    def _shard(self, number: int) -> np.ndarray:
        if self._open is None or self._open[0] != number:
            images = self._load(self._starts[number])
            assert images is not None
            self._open = number, images
        return self._open[1]

    def _load(self, start: int) -> np.ndarray | None:
        """The shard that begins there; None where there is none, or one that a crash of the machine cut short."""
        try:
            images: np.ndarray = np.load(self._path(start), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        fits = images.dtype == np.uint8 and images.shape[1:] == self.size and 0 < len(images) <= self.total - start
        return images if fits else None

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}.npy"


def _work_folder(out: Path) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.partial")


@contextmanager
def _claimed(folder: Path, out: Path) -> Iterator[None]:
    """Holds the folder, made if need be, against other processes; a lock ends with its process."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, out)
        yield
    finally:
        os.close(lock)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RequestError(
            f"another process is writing {out}", remedy="wait for it or choose another --out", param="out"
        ) from error


def _noted_request(folder: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads((folder / REQUEST).read_text())
    return None


def _check_same(folder: Path, request: SampleRequest) -> None:
    """Notes the request in its folder, or compares it with the one noted there; shards of an unknown one are dropped."""
    found = _noted_request(folder)
    if not isinstance(found, dict):
        for orphan in folder.glob("*.npy"):
            orphan.unlink()
        with atomic_file(folder / REQUEST) as partial:
            partial.write_text(json.dumps(request.facts()))
    elif found != request.facts():
        raise RequestError(
            f"{folder} holds an unfinished run of another request ({_difference(found, request.facts())})",
            remedy="finish that with its own command, delete the folder, or choose another --out",
            param="out",
        )


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs, in words: 'batch 64 there, 32 here'."""
    texts = []
    for name in (name for name in wanted if found.get(name) != wanted[name]):
        hashed = name.endswith("_sha256")
        texts.append(f"other {name[:-7]}" if hashed else f"{name} {found.get(name)} there, {wanted[name]} here")
    return ", ".join(texts)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
