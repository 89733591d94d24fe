"""Make a request's set of samples on disk, with one process or with several that share the output's folder.

Finished shards are kept in a work folder beside the output (`.NAME.partial`). The output itself appears at the end, complete.
After an interruption the same request continues from the finished shards.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine
from uni_instruct.errors import RequestError
from uni_instruct.generate import generate_batches, sample_format
from uni_instruct.sampling.forms import SampleSet, finished_request, form_of, work_folder
from uni_instruct.sampling.pool import Pool, Task
from uni_instruct.sampling.sample_set import RequestFacts
from uni_instruct.sampling.shards import WHOLE, Part, Shard, Shards, images_per_shard
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import JSON_ERRORS, atomic_file, disk_errors, locked, make_folder, try_lock
from uni_instruct.system.progress import Progress

log = logging.getLogger(__name__)

REQUEST = "request.json"
# Each process holds the first lock while it works in the folder, and the second while it writes the request or the output.
WORKERS_LOCK, REQUEST_LOCK = "workers.lock", "request.lock"
# A process with nothing left to claim checks at this interval whether the other processes have finished or died.
POLL_INTERVAL_S = 0.2
# Engine names in sets that were started before engines had ids -> their ids.
_FORMER_ENGINES = {"onnx": "onnx-fp32", "torch": "torch-fp32"}


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The images to make. The batch size is part of the request, since with some engines the last float bit depends on it."""

    bundle: Bundle
    engine: str
    seeds: list[int] = field(repr=False)
    class_ids: np.ndarray | None = field(repr=False)
    batch: int = 64

    @property
    def spec(self) -> ModelSpec:
        """The generator's spec."""
        return self.bundle.spec

    def facts(self) -> RequestFacts:
        """The values that identify this request, for JSON."""
        labels = None if self.class_ids is None else _digest(self.class_ids)
        facts: RequestFacts = {
            "generator": self.spec.name,
            "weights_sha256": self.bundle.weights_sha256,
            "engine": self.engine,
            "batch": self.batch,
            "images": len(self.seeds),
            "seeds_sha256": _digest(np.array(self.seeds, dtype=np.int64)),
            "class_ids_sha256": labels,
        }
        if self.spec.steps > 1:
            facts["steps"] = self.spec.steps
        return facts


class SampleRun:
    """A request's work folder: `fill` makes the missing shards, `finish` writes the set.

    part: the shards that this process makes. A process that finds all shards of the request done writes the set.
    """

    def __init__(self, request: SampleRequest, out: Path, shards: Shards, part: Part = WHOLE):
        self.request, self.out, self.shards, self.part = request, out, shards, part

    @property
    def count(self) -> int:
        """The number of images in the part."""
        return sum(map(len, self.part.of(self.shards.all())))

    @property
    def done(self) -> int:
        """The number of the part's images that exist already, from any process. If all exist, no engine is needed."""
        return self.count - sum(map(len, self._missing()))

    @property
    def is_complete(self) -> bool:
        """Whether all images of the request exist, so that `finish` can write the set."""
        return is_finished(self.request, self.out) or not self.shards.missing()

    def fill(self, engine: Engine, progress: Progress) -> None:
        """Make the part's missing shards, together with other processes, until all of them are done.

        If another process has claimed a shard, this one waits for it, and takes the shard over if that process dies.
        """
        left = self._missing()
        while left:
            others = []
            for shard in left:
                with self.shards.claimed(shard) as mine:
                    if mine:
                        self._make(shard, engine, progress)
                    elif self.shards.is_done(shard):
                        progress.advance(len(shard))
                    else:
                        others.append(shard)
            if len(others) == len(left):
                time.sleep(POLL_INTERVAL_S)
            left = others

    def fill_with_pool(self, pool: Pool[np.ndarray], progress: Progress) -> None:
        """As `fill`, with the workers of a pool: this process claims shards, submits them and writes the results."""
        left, claims = deque(self._missing()), dict[Shard, ExitStack]()
        with ExitStack() as held:
            while left or claims:
                for _ in range(len(left)):
                    if not pool.idle:
                        break
                    shard = left.popleft()
                    # A claim is held until its shard is written. `held` releases all claims if an error ends this loop.
                    claim = held.enter_context(ExitStack())
                    if claim.enter_context(self.shards.claimed(shard)):
                        claims[shard] = claim
                        pool.submit(self._task(shard))
                    elif self.shards.is_done(shard):
                        progress.advance(len(shard))
                    else:
                        claim.close()
                        left.append(shard)
                for shard, images in pool.wait(POLL_INTERVAL_S):
                    self.shards.write(shard, images)
                    claims.pop(shard).close()
                    progress.advance(len(shard))

    def _task(self, shard: Shard) -> Task:
        class_ids = None if self.request.class_ids is None else self.request.class_ids[shard.rows]
        return Task(shard, np.array(self.request.seeds[shard.rows], dtype=np.int64), class_ids)

    def finish(self) -> None:
        """Write the complete set, unless another process has done so. Raises DiskError if it cannot be written."""
        request, folder = self.request, self.shards.folder
        with locked(folder / REQUEST_LOCK):
            if is_finished(request, self.out):
                return
            samples = SampleSet(
                spec=request.spec,
                seeds=request.seeds,
                class_ids=request.class_ids,
                reader=self.shards,
                request=request.facts(),
            )
            # Written to the work folder first: what a killed process leaves of it is removed with that folder.
            staged = folder / self.out.name
            form_of(self.out).write(samples, staged)
            with disk_errors(self.out):
                os.replace(staged, self.out)

    def _missing(self) -> list[Shard]:
        """The part's missing shards; none if the set is written, since the shards may have been removed by then."""
        return [] if is_finished(self.request, self.out) else self.shards.missing(self.part)

    def _make(self, shard: Shard, engine: Engine, progress: Progress) -> None:
        request = self.request
        class_ids = None if request.class_ids is None else request.class_ids[shard.rows]
        made = []
        for images in generate_batches(engine, request.seeds[shard.rows], class_ids, request.batch):
            made.append(images)
            progress.advance(len(images))
        self.shards.write(shard, np.concatenate(made))


@contextmanager
def open_run(request: SampleRequest, out: Path, *, shared: bool = False, part: Part = WHOLE) -> Iterator[SampleRun]:
    """Open the request's run, new or with the shards that earlier or other processes have made. They survive a failure.

    shared: several processes, on all machines that see the folder, may open the same run at once, with the same request.
    Otherwise the run is exclusive to this process. part: what this process makes.

    Raises RequestError if `out` or its work folder belongs to another request, if the form of `out` cannot hold these samples,
    or if another process has the run. Raises DiskError if nothing can be written.
    """
    form_of(out).check(request.spec, request.seeds)
    folder = work_folder(out)
    per_shard = images_per_shard(request.spec, request.batch)
    lock = _enter(folder, out, shared)
    try:
        with locked(folder / REQUEST_LOCK):
            _note_request(folder, request, per_shard)
        # The shards do not depend on the values: latents differ from pictures in size and type only.
        size, dtype = sample_format(request.spec)
        yield SampleRun(request, out, Shards(folder, size, dtype, len(request.seeds), per_shard), part)
    finally:
        _leave(lock, request, out, shared)


def is_finished(request: SampleRequest, out: Path) -> bool:
    """Whether `out` is this request's finished set. False if there is nothing yet; RequestError if there is something else."""
    if _is_empty(out):
        return False
    found = _with_ids(finished_request(out))
    if found == request.facts():
        return True
    other = f"holds the images of another request ({_difference(found, request.facts())})" if found else ""
    fault = other or "exists and is not a set of samples"
    raise RequestError(f"{out} {fault}", remedy="choose another --out or delete it", param="out")


def recorded_engine(out: Path) -> str | None:
    """The id of the engine that made the set at `out`, or has started it; None if there is no such set."""
    found = _with_ids(_noted_request(work_folder(out)) if _is_empty(out) else finished_request(out))
    engine = found["engine"] if found else None
    return str(engine) if engine else None


def remove_leftovers(request: SampleRequest, out: Path) -> None:
    """Remove the work folder of a finished set, which remains if a process was killed between writing and removing."""
    folder = work_folder(out)
    found = _with_ids(_noted_request(folder))
    if found and {**found, "images_per_shard": 0} == {**request.facts(), "images_per_shard": 0}:
        with suppress(RequestError):  # raised while other processes use the folder; the last of them removes it
            _leave(_enter(folder, out, shared=False), request, out, shared=False)


def _is_empty(out: Path) -> bool:
    with disk_errors(out):
        return not out.exists() or (out.is_dir() and form_of(out).is_folder and not any(out.iterdir()))


def _enter(folder: Path, out: Path, shared: bool) -> int:
    """Create the work folder if needed and take the lock that marks this process as working there. Returns the open file."""
    path = folder / WORKERS_LOCK
    while True:
        with disk_errors(folder):
            make_folder(folder, out)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # the process that finished the set has just removed the folder
        held = try_lock(file, shared=shared)
        if held is False:
            os.close(file)
            if shared and not _is_empty(out):  # the set is finished, and another process is removing the folder
                time.sleep(POLL_INTERVAL_S)
                continue
            raise RequestError(f"another process is writing {out}", remedy="wait for it or choose another --out", param="out")
        if held is None:
            log.warning("%s is on a file system without locks: two processes may make the same images", folder)
        with suppress(FileNotFoundError):
            # Before the lock was taken, another process may have removed the folder, and the locked file with it.
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _leave(lock: int, request: SampleRequest, out: Path, shared: bool) -> None:
    """Release the lock; remove the work folder if it is no longer needed and no other process uses it."""
    folder = work_folder(out)
    try:
        # On a file system without locks (None) other processes cannot be detected.
        alone = try_lock(lock) is True or not shared
        finished = not _is_empty(out) and _with_ids(finished_request(out)) == request.facts()
        if alone and (finished or not any(folder.glob("*.npy"))):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _noted_request(folder: Path) -> RequestFacts | None:
    with suppress(OSError, *JSON_ERRORS):
        found: RequestFacts = json.loads((folder / REQUEST).read_text())
        return found if isinstance(found, dict) else None
    return None


def _note_request(folder: Path, request: SampleRequest, per_shard: int) -> None:
    """Write the request to its work folder, or compare it with the one written there. Shards without a request are deleted."""
    found = _with_ids(_noted_request(folder))
    wanted: RequestFacts = {**request.facts(), "images_per_shard": per_shard}
    if found is None:
        for orphan in folder.glob("*.npy"):
            orphan.unlink()
        with atomic_file(folder / REQUEST) as partial:
            partial.write_text(json.dumps(wanted))
    # Older versions did not record images_per_shard. Their shards are kept if they have today's ranges, otherwise made again.
    elif {**found, "images_per_shard": found.get("images_per_shard", per_shard)} != wanted:
        what = _difference(found, request.facts()) or _difference(found, wanted)
        raise RequestError(
            f"{folder} holds an unfinished run of another request ({what})",
            remedy="finish that with its own command, delete the folder, or choose another --out",
            param="out",
        )


def _with_ids(facts: RequestFacts | None) -> RequestFacts | None:
    """The facts with the engine's id in place of its name in older versions."""
    if not facts:
        return facts
    return {**facts, "engine": _FORMER_ENGINES.get(str(facts.get("engine")), facts.get("engine", ""))}


def _difference(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """The differences in words, such as 'batch 64 there, 32 here'."""
    texts = []
    for name in (name for name in wanted if found.get(name) != wanted[name]):
        hashed = name.endswith("_sha256")
        texts.append(f"other {name[:-7]}" if hashed else f"{name} {found.get(name)} there, {wanted[name]} here")
    return ", ".join(texts)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
