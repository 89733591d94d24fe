"""A request on its way to a set of samples on disk, by one process or by several that share the output's folder.

Finished shards wait in a folder beside the output (`.NAME.partial`); the output appears whole, at the end. The same request
again goes on where an interrupted one was.
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
from uni_instruct.files import JSON_ERRORS, atomic_file, disk_errors, locked, make_folder, try_lock
from uni_instruct.generate import generate_batches, sample_format
from uni_instruct.progress import Progress
from uni_instruct.sampling.forms import SampleSet, finished_request, form_of, work_folder
from uni_instruct.sampling.pool import Pool, Task
from uni_instruct.sampling.sample_set import RequestFacts
from uni_instruct.sampling.shards import WHOLE, Part, Shard, Shards, images_per_shard
from uni_instruct.spec import ModelSpec

log = logging.getLogger(__name__)

REQUEST = "request.json"
# Held while a process works here; and while it changes what all of them rely on: the request, and the finished set.
WORKERS_LOCK, REQUEST_LOCK = "workers.lock", "request.lock"
# How often a process that has nothing left to claim looks whether the others are done, or dead.
LOOK_S = 0.2
# Engines of sets that were begun before engines had ids.
_FORMER_ENGINES = {"onnx": "onnx-fp32", "torch": "torch-fp32"}


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

    def facts(self) -> RequestFacts:
        """What tells this request from another, for JSON."""
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
    """A request's work folder: `fill` makes the shards that nobody has made, `finish` writes the set.

    part: which of the shards this process is to make; whoever finds all of them there writes the set.
    """

    def __init__(self, request: SampleRequest, out: Path, shards: Shards, part: Part = WHOLE):
        self.request, self.out, self.shards, self.part = request, out, shards, part

    @property
    def count(self) -> int:
        """Images of the part."""
        return sum(map(len, self.part.of(self.shards.all())))

    @property
    def done(self) -> int:
        """Images of the part that are made already, by anybody. Where it is all of them no engine is needed."""
        return self.count - sum(map(len, self._missing()))

    @property
    def is_complete(self) -> bool:
        """Whether every image of the request is made, so that `finish` can write the set."""
        return is_finished(self.request, self.out) or not self.shards.missing()

    def fill(self, engine: Engine, progress: Progress) -> None:
        """Makes what is missing, beside others that do, until all of it is done.

        A shard that another process has claimed is waited for, and taken over where that process dies.
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
                time.sleep(LOOK_S)
            left = others

    def fill_with(self, pool: Pool[np.ndarray], progress: Progress) -> None:
        """The same by the workers of a pool: this process claims shards, hands them out and writes what comes back."""
        left, claims = deque(self._missing()), dict[Shard, ExitStack]()
        with ExitStack() as held:
            while left or claims:
                for _ in range(len(left)):
                    if not pool.idle:
                        break
                    shard = left.popleft()
                    claim = held.enter_context(ExitStack())
                    if claim.enter_context(self.shards.claimed(shard)):
                        claims[shard] = claim
                        pool.submit(self._task(shard))
                    elif self.shards.is_done(shard):
                        progress.advance(len(shard))
                    else:
                        claim.close()
                        left.append(shard)
                for shard, images in pool.wait(LOOK_S):
                    self.shards.write(shard, images)
                    claims.pop(shard).close()
                    progress.advance(len(shard))

    def _task(self, shard: Shard) -> Task:
        class_ids = None if self.request.class_ids is None else self.request.class_ids[shard.rows]
        return Task(shard, np.array(self.request.seeds[shard.rows], dtype=np.int64), class_ids)

    def finish(self) -> None:
        """Writes the set whole, unless another process has. Raises DiskError where it cannot be written."""
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
            # First among the shards: what a kill leaves half-written there goes when the run is done.
            staged = folder / self.out.name
            form_of(self.out).write(samples, staged)
            with disk_errors(self.out):
                os.replace(staged, self.out)

    def _missing(self) -> list[Shard]:
        """Nothing once the set is there: whoever wrote it may have removed the shards."""
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
    """The request's run, at the point where others left it or are. What is done survives a failure.

    shared: several processes, of any machines that see the folder, may open the same run at once, each with the same request;
    otherwise one has it to itself. part: what of it this process is to make. Raises RequestError where `out` or its run hold
    another request, cannot hold this one, or are another's; DiskError where nothing can be written.
    """
    form_of(out).check(request.spec, request.seeds)
    folder = work_folder(out)
    per_shard = images_per_shard(request.spec, request.batch)
    lock = _enter(folder, out, shared)
    try:
        with locked(folder / REQUEST_LOCK):
            _note_request(folder, request, per_shard)
        # Nothing from here to the form looks at values: of latents, size and type alone are others.
        size, dtype = sample_format(request.spec)
        yield SampleRun(request, out, Shards(folder, size, dtype, len(request.seeds), per_shard), part)
    finally:
        _leave(lock, request, out, shared)


def is_finished(request: SampleRequest, out: Path) -> bool:
    """Whether `out` is this request's finished set, of which no work is then left.

    Raises RequestError where something else stands there.
    """
    if _is_empty(out):
        return False
    found = _with_ids(finished_request(out))
    if found == request.facts():
        return True
    holds = f"the images of another request ({_difference(found, request.facts())})" if found else "something else"
    raise RequestError(f"{out} holds {holds}", remedy="choose another --out or delete it", param="out")


def noted_engine(out: Path) -> str | None:
    """The id of the engine that made what stands at `out`, or has begun to; None where nothing of ours does."""
    found = _with_ids(_noted_request(work_folder(out)) if _is_empty(out) else finished_request(out))
    engine = found["engine"] if found else None
    return str(engine) if engine else None


def remove_leftovers(request: SampleRequest, out: Path) -> None:
    """Removes the work folder of a finished set, where a run was killed after its last step but one."""
    folder = work_folder(out)
    found = _with_ids(_noted_request(folder))
    if found and {**found, "images_per_shard": 0} == {**request.facts(), "images_per_shard": 0}:
        with suppress(RequestError):  # others are still in it, and the last of them removes it
            _leave(_enter(folder, out, shared=False), request, out, shared=False)


def _is_empty(out: Path) -> bool:
    with disk_errors(out):
        return not out.exists() or (out.is_dir() and form_of(out).is_folder and not any(out.iterdir()))


def _enter(folder: Path, out: Path, shared: bool) -> int:
    """The open lock that says that a process works in the folder, which is made if need be."""
    path = folder / WORKERS_LOCK
    while True:
        with disk_errors(folder):
            make_folder(folder, out)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # whoever finished the set has just removed the folder
        held = try_lock(file, shared=shared)
        if held is False:
            os.close(file)
            if shared and not _is_empty(out):  # it is finished, and whoever finished it is removing the folder
                time.sleep(LOOK_S)
                continue
            raise RequestError(f"another process is writing {out}", remedy="wait for it or choose another --out", param="out")
        if held is None:
            log.warning("%s is on a file system without locks: processes may make the same images twice", folder)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _leave(lock: int, request: SampleRequest, out: Path, shared: bool) -> None:
    """Removes the work folder where it is of no more use and nobody else is in it."""
    folder = work_folder(out)
    try:
        # Without locks (None) nobody knows who else is there.
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
    """Notes the request in its folder, or compares it with the one noted there; shards of an unknown one are dropped."""
    found = _with_ids(_noted_request(folder))
    wanted: RequestFacts = {**request.facts(), "images_per_shard": per_shard}
    if found is None:
        for orphan in folder.glob("*.npy"):
            orphan.unlink()
        with atomic_file(folder / REQUEST) as partial:
            partial.write_text(json.dumps(wanted))
    # A run of before shards had fixed ranges says nothing of them: those that have today's are taken, the others made anew.
    elif {**found, "images_per_shard": found.get("images_per_shard", per_shard)} != wanted:
        what = _difference(found, request.facts()) or _difference(found, wanted)
        raise RequestError(
            f"{folder} holds an unfinished run of another request ({what})",
            remedy="finish that with its own command, delete the folder, or choose another --out",
            param="out",
        )


def _with_ids(facts: RequestFacts | None) -> RequestFacts | None:
    """The facts with an engine's id in place of its former name."""
    if not facts:
        return facts
    return {**facts, "engine": _FORMER_ENGINES.get(str(facts.get("engine")), facts.get("engine", ""))}


def _difference(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """What differs, in words: 'batch 64 there, 32 here'."""
    texts = []
    for name in (name for name in wanted if found.get(name) != wanted[name]):
        hashed = name.endswith("_sha256")
        texts.append(f"other {name[:-7]}" if hashed else f"{name} {found.get(name)} there, {wanted[name]} here")
    return ", ".join(texts)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
