"""POST /v1/compare: the same noise through the served engine and through another engine of the bundle, or the teacher.

For the demo. The other engine is opened when it is first requested, and runs in a separate thread, one call at a time.
"""

import asyncio
import base64
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from uni_instruct.bundle import Bundle, is_bundle
from uni_instruct.class_map import match_classes
from uni_instruct.engine import RUNTIMES, Engine, available_engines, engine_status, open_engine
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.images import encode, grid
from uni_instruct.noise import Inputs, draw_inputs
from uni_instruct.serve.errors import TimedOutError, TooManyComparisonsError
from uni_instruct.serve.models.served_model import ServedModel
from uni_instruct.serve.routes.schema import Seed, ShortErrors
from uni_instruct.spec import ModelSpec, evaluations

TEACHER = "teacher"
MAX_COMPARED = 16
_MAX_WAITING = 4  # comparisons that run or wait
_RETRY_AFTER_S = 2
_MAX_OPEN = 4

_P = ParamSpec("_P")
_T = TypeVar("_T")


class CompareRequest(BaseModel):
    """The body of POST /v1/compare."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(
        None,
        description="Name of the generator, as GET /v1/models lists it. By default the first.",
        examples=["a model of GET /v1/models"],
    )
    other: str = Field(
        description="An engine id of the bundle, or 'teacher': what GET /v1/about lists under 'compare'.",
        examples=["an engine id, such as torch-fp32, or teacher"],
    )
    seeds: ShortErrors[Seed] = Field(
        description="1 to 16 seeds, one image for each, as integers or strings of digits.",
        examples=["a list of seeds, such as [7, 8]"],
    )
    class_ids: ShortErrors[int] | None = Field(
        None,
        description="Class ids: one for all images, or one for each. By default each seed draws its own.",
        examples=["a list of integers, such as [3]"],
    )


@dataclass(frozen=True)
class Side:
    """The result of one side: its images uint8 [N, H, W, C], and the milliseconds of its engine's time."""

    id: str
    spec: ModelSpec
    device: str
    images: np.ndarray
    model_ms: float

    def facts(self) -> dict[str, object]:
        """Return this side for JSON, with its images as one PNG sheet."""
        return {
            "id": self.id,
            "steps": self.spec.steps,
            "evaluations": evaluations(self.spec.steps),
            "device": self.device,
            "model_ms": round(self.model_ms, 3),
            "b64_png": base64.b64encode(encode(grid(self.images))).decode(),
        }


class SideBySide:
    """Runs comparisons. Other engines are opened on first use and kept open, at most _MAX_OPEN of them."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, str, str], Engine] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compare")
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def run(self, served: ServedModel, wanted: CompareRequest) -> dict[str, object]:
        """Return both sides and their difference, for JSON.

        Raises RequestError for a bad request, TooManyComparisonsError if _MAX_WAITING of them run or wait already,
        TimedOutError, and what `Batcher.submit` and opening an engine raise.
        """
        if not 1 <= len(wanted.seeds) <= MAX_COMPARED:
            remedy = f"compare 1 to {MAX_COMPARED}"
            raise RequestError(f"{len(wanted.seeds)} images were asked for", remedy=remedy, param="seeds")
        seeds = [int(seed) for seed in wanted.seeds]
        class_ids = resolve_class_ids(served.spec, seeds, wanted.class_ids)
        if self._waiting >= _MAX_WAITING:
            raise TooManyComparisonsError(self._waiting, _RETRY_AFTER_S)
        self._waiting += 1
        try:
            async with self._turn:
                # The timeout does not cover opening: importing torch takes seconds, once, and a retry would wait for it too.
                engine = await self._in_thread(self._engine_for, served.bundle, wanted.other)
                own, other = await self._both_sides(served, engine, wanted.other, seeds, class_ids)
        finally:
            self._waiting -= 1
        return {"sides": [own.facts(), other.facts()], "difference": difference(own.images, other.images)}

    async def _both_sides(
        self, served: ServedModel, engine: Engine, other: str, seeds: list[int], class_ids: np.ndarray | None
    ) -> tuple[Side, Side]:
        """Run both sides one after the other, so that they do not slow each other down."""
        timeout_s = served.settings.timeout_s
        generated = await served.batcher.submit(seeds, class_ids, timeout_s)
        own = Side(str(served.engine.id), served.spec, served.engine.device, generated.images, generated.model_ms)
        inputs = draw_inputs(served.spec, seeds, class_ids_of_teacher(engine.spec, served.spec, class_ids))
        try:
            async with asyncio.timeout(timeout_s):
                images, model_ms = await self._in_thread(_timed, engine, inputs)
        except TimeoutError:
            raise TimedOutError(f"the comparison was not made within {timeout_s:g} s", remedy="compare fewer images") from None
        return own, Side(other, engine.spec, engine.device, images, model_ms)

    async def _in_thread(self, work: Callable[_P, _T], *arguments: _P.args, **keywords: _P.kwargs) -> _T:
        call = functools.partial(work, *arguments, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """Close all engines, after the running call."""
        self._thread.shutdown()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _engine_for(self, bundle: Bundle, other: str) -> Engine:
        """Return the other engine, opened and warmed up. Runs in the thread. Raises RequestError if there is no such engine."""
        # The key has the weights' hash, because a bundle that was replaced on disk needs new engines.
        key = (str(bundle.path), bundle.weights_sha256, other)
        if key not in self._engines:
            if other not in (names := [choice["id"] for choice in choices(bundle, "")]):
                raise RequestError(
                    f"there is no '{other[:60]}' to compare with", remedy=f"choose one of {', '.join(names)}", param="other"
                )
            teacher = find_teacher(bundle) if other == TEACHER else None
            engine = open_engine(teacher or bundle, None if teacher else other, spin=False)
            # Warm it up, as the served engine was. Otherwise the measured time would include a runtime's slow first call.
            engine(*draw_inputs(engine.spec, [0], np.zeros(1, dtype=np.int64) if engine.spec.num_classes else None))
            self._engines[key] = engine
            # To limit memory, close the engines that were opened first.
            while len(self._engines) > _MAX_OPEN:
                self._engines.pop(next(iter(self._engines))).close()
        return self._engines[key]


def class_ids_of_teacher(other: ModelSpec, spec: ModelSpec, class_ids: np.ndarray | None) -> np.ndarray | None:
    """The class ids of `spec` in the numbering of `other`, matched by name: a teacher may have its classes in another order."""
    ids = match_classes(spec.class_names, other.class_names, "the generator", "the teacher")
    return class_ids if ids is None or class_ids is None else ids[class_ids]


def _timed(engine: Engine, inputs: Inputs) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    images = engine(*inputs)
    return images, 1e3 * (time.perf_counter() - start)


def choices(bundle: Bundle, served: str) -> list[dict[str, str]]:
    """List what the served engine can be compared with on this machine: [{id, label}], the teacher first."""
    found = []
    if teacher := find_teacher(bundle):
        found.append({"id": TEACHER, "label": f"teacher, {teacher.spec.steps} steps"})
    for engine_id in available_engines(bundle):
        installed = engine_id.runtime in RUNTIMES and RUNTIMES[engine_id.runtime].is_installed()
        if installed and str(engine_id) != served and engine_status(bundle, engine_id).state != "refused":
            found.append({"id": str(engine_id), "label": str(engine_id)})
    return found


def find_teacher(bundle: Bundle) -> Bundle | None:
    """Find the many-step teacher of a generator: in the folder `teacher` in the bundle or beside it, where a run puts it.

    Return None if there is none, or it cannot run here, or it takes other noise or classes.
    """
    for folder in (bundle.path / TEACHER, bundle.path.resolve().parent / TEACHER):
        if not is_bundle(folder):
            continue
        try:
            return _fitting(Bundle.open(Path(folder)), bundle.spec)
        except UniInstructError:
            continue  # a damaged teacher must not break the demo
    return None


def _fitting(teacher: Bundle, spec: ModelSpec) -> Bundle | None:
    same = (teacher.spec.noise_shape, teacher.spec.num_classes) == (spec.noise_shape, spec.num_classes)
    runs = RUNTIMES["torch"].is_installed() or bool(teacher.engines())
    match_classes(spec.class_names, teacher.spec.class_names, "the generator", "the teacher")  # another's classes
    return teacher if same and runs and teacher.spec.makes_pictures else None


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, object]:
    """Return |first - second| of images uint8 [N, H, W, C] for JSON: as numbers, and as a sheet amplified by `gain`.

    gain is the largest whole factor by which the largest difference still fits into 255.
    """
    levels = np.abs(first.astype(np.int16) - second)
    largest = int(levels.max())
    gain = 255 // largest if largest else 1
    return {
        "largest_levels": largest,
        "mean_levels": round(float(levels.mean()), 4),
        "equal_share": round(float((levels == 0).mean()), 6),
        "gain": gain,
        "b64_png": base64.b64encode(encode(grid((levels * gain).astype(np.uint8)))).decode(),
    }
