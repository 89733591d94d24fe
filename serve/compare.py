"""POST /v1/compare: the same noise through the served engine and another: an engine of the bundle, or the teacher.

For the demo: the other one is opened when it is first asked for, and runs in a thread of its own, one call at a time.
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
from uni_instruct.engine import RUNTIMES, Engine, available_engines, engine_standing, open_engine
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.images import encode, grid
from uni_instruct.noise import Inputs, draw_inputs
from uni_instruct.serve.errors import QueueFullError, TimedOutError
from uni_instruct.serve.schema import Seed, ShortErrors
from uni_instruct.serve.served_model import ServedModel
from uni_instruct.spec import ModelSpec, evaluations

TEACHER = "teacher"
MAX_COMPARED = 16
_MOST_WAITING = 4
_MOST_OPEN = 4

_P = ParamSpec("_P")
_T = TypeVar("_T")


class CompareRequest(BaseModel):
    """The body of POST /v1/compare."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(
        None,
        description="Which of the generators that are served; without it the first.",
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
        None, description="One for all images, or one for each.", examples=["a list of integers, such as [3]"]
    )


@dataclass(frozen=True)
class Side:
    """What one side made, uint8 [N, H, W, C], in how many milliseconds."""

    id: str
    spec: ModelSpec
    device: str
    images: np.ndarray
    model_ms: float

    def facts(self) -> dict[str, object]:
        """For JSON, with the images as one sheet."""
        return {
            "id": self.id,
            "steps": self.spec.steps,
            "evaluations": evaluations(self.spec.steps),
            "device": self.device,
            "model_ms": round(self.model_ms, 3),
            "b64_png": base64.b64encode(encode(grid(self.images))).decode(),
        }


class SideBySide:
    """The engines that the served one is compared with. They are opened when they are first asked for, and kept."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, str, str], Engine] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compare")
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def run(self, served: ServedModel, wanted: CompareRequest) -> dict[str, object]:
        """Both sides and their difference, for JSON. Raises RequestError, QueueFullError, TimedOutError."""
        if not 1 <= len(wanted.seeds) <= MAX_COMPARED:
            remedy = f"compare 1 to {MAX_COMPARED}"
            raise RequestError(f"{len(wanted.seeds)} images were asked for", remedy=remedy, param="seeds")
        seeds = [int(seed) for seed in wanted.seeds]
        class_ids = resolve_class_ids(served.spec, seeds, wanted.class_ids)
        if self._waiting >= _MOST_WAITING:
            raise QueueFullError(self._waiting, _MOST_WAITING, 2)
        self._waiting += 1
        try:
            async with self._turn:
                # Opening is not counted: torch alone takes seconds, once, and a second attempt would wait for the same.
                engine = await self._in_thread(self._opened, served.bundle, wanted.other)
                own, other = await self._both_sides(served, engine, wanted.other, seeds, class_ids)
        finally:
            self._waiting -= 1
        return {"sides": [own.facts(), other.facts()], "difference": difference(own.images, other.images)}

    async def _both_sides(
        self, served: ServedModel, engine: Engine, other: str, seeds: list[int], class_ids: np.ndarray | None
    ) -> tuple[Side, Side]:
        """One after the other, each with the machine to itself."""
        timeout_s = served.settings.timeout_s
        generated = await served.batcher.submit(seeds, class_ids, timeout_s)
        own = Side(str(served.engine.id), served.spec, served.engine.device, generated.images, generated.model_ms)
        inputs = draw_inputs(served.spec, seeds, numbered_as(engine.spec, served.spec, class_ids))
        try:
            async with asyncio.timeout(timeout_s):
                images, model_ms = await self._in_thread(_timed, engine, inputs)
        except TimeoutError:
            raise TimedOutError(f"the comparison was not made in {timeout_s:g} s", remedy="compare fewer images") from None
        return own, Side(other, engine.spec, engine.device, images, model_ms)

    async def _in_thread(self, work: Callable[_P, _T], *arguments: _P.args, **keywords: _P.kwargs) -> _T:
        call = functools.partial(work, *arguments, **keywords)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """Closes every engine, after the call that runs."""
        self._thread.shutdown()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _opened(self, bundle: Bundle, other: str) -> Engine:
        """In the thread. Raises RequestError where there is no such other."""
        # With the weights' hash: a bundle that was exchanged is another one.
        key = (str(bundle.path), bundle.weights_sha256, other)
        if key not in self._engines:
            if other not in (names := [choice["id"] for choice in choices(bundle, "")]):
                raise RequestError(
                    f"there is no '{other[:60]}' to compare with", remedy=f"choose one of {', '.join(names)}", param="other"
                )
            teacher = find_teacher(bundle) if other == TEACHER else None
            engine = open_engine(teacher or bundle, None if teacher else other, spin=False)
            # Warmed up like the served engine, or its first images would be compared with a runtime's preparations.
            engine(*draw_inputs(engine.spec, [0], np.zeros(1, dtype=np.int64) if engine.spec.num_classes else None))
            self._engines[key] = engine
            while len(self._engines) > _MOST_OPEN:
                self._engines.pop(next(iter(self._engines))).close()
        return self._engines[key]


def numbered_as(other: ModelSpec, spec: ModelSpec, class_ids: np.ndarray | None) -> np.ndarray | None:
    """The class ids of one model in the numbering of the other, by name: a teacher may have its classes in another order."""
    ids = match_classes(spec.class_names, other.class_names, "the generator", "the teacher")
    return class_ids if ids is None or class_ids is None else ids[class_ids]


def _timed(engine: Engine, inputs: Inputs) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    images = engine(*inputs)
    return images, 1e3 * (time.perf_counter() - start)


def choices(bundle: Bundle, served: str) -> list[dict[str, str]]:
    """What the served engine can be compared with here: [{id, label}], the teacher first."""
    found = []
    if teacher := find_teacher(bundle):
        found.append({"id": TEACHER, "label": f"teacher, {teacher.spec.steps} steps"})
    for engine_id in available_engines(bundle):
        installed = engine_id.runtime in RUNTIMES and RUNTIMES[engine_id.runtime].is_installed()
        if installed and str(engine_id) != served and engine_standing(bundle, engine_id).state != "refused":
            found.append({"id": str(engine_id), "label": str(engine_id)})
    return found


def find_teacher(bundle: Bundle) -> Bundle | None:
    """The many-step model that the generator was distilled from, in the bundle's folder `teacher` or beside it, as in a run.

    None where there is none that can run here on the same noise.
    """
    for folder in (bundle.path / TEACHER, bundle.path.resolve().parent / TEACHER):
        if not is_bundle(folder):
            continue
        try:
            return _fitting(Bundle.open(Path(folder)), bundle.spec)
        except UniInstructError:
            continue  # damaged: the demo does without it
    return None


def _fitting(teacher: Bundle, spec: ModelSpec) -> Bundle | None:
    same = (teacher.spec.noise_shape, teacher.spec.num_classes) == (spec.noise_shape, spec.num_classes)
    runs = RUNTIMES["torch"].is_installed() or bool(teacher.engines())
    match_classes(spec.class_names, teacher.spec.class_names, "the generator", "the teacher")  # another's classes
    return teacher if same and runs and teacher.spec.makes_pictures else None


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, object]:
    """|first - second| of images uint8 [N, H, W, C], as numbers and as a sheet whose largest difference is white."""
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
