"""Runs one engine of a bundle on its reference images, in a process that may die of it. Needs no torch, unless torch is tried.

`trial.try_engine` calls it as `python -m uni_instruct.engines.trials.worker BUNDLE ENGINE_ID DEVICE`; it prints a `Trial`.
"""

import json
import sys
import time
from dataclasses import asdict, replace

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import TORCH, Engine, EngineId, load_engine
from uni_instruct.engines.outputs import TOLERANCES, Outputs, agreement
from uni_instruct.engines.record import COMPILED
from uni_instruct.engines.trials.trial import Trial
from uni_instruct.errors import MissingExtraError, UniInstructError
from uni_instruct.noise import noise
from uni_instruct.reference import reference_inputs

# The fastest of so many calls, or of those that fit into the time: other work on the machine only ever adds to it.
CALLS, CALLS_S = 5, 1.0


def main(bundle_path: str, engine: str, device: str) -> Trial:
    """What the engine did. Raises where that says nothing about it: a package is missing, memory is short."""
    bundle, engine_id = Bundle.open(bundle_path), EngineId.parse(engine)
    try:
        opened = load_engine(bundle, bundle.engines().get(engine_id, engine_id), device=device)
        return _try(bundle, opened)
    except (MissingExtraError, MemoryError, ModuleNotFoundError):
        raise
    except UniInstructError as error:
        return Trial(problem=error.problem)
    except Exception as error:  # a runtime's errors share no class but this one
        problem = " ".join(str(error).split())[:200]
        return Trial(problem=f"it raises {type(error).__name__}: {problem}")


def _try(bundle: Bundle, engine: Engine) -> Trial:
    reference = bundle.reference()
    seeds, class_ids = reference_inputs(bundle.spec)
    z = noise(seeds.tolist(), bundle.spec.noise_shape)
    truth = None if reference is None else reference.images
    if reference:
        z, class_ids = reference.noise(bundle.spec), reference.class_ids
    elif engine.id.target == COMPILED:  # a teacher's, which torch itself is at hand to compare with
        truth = load_engine(bundle, TORCH, device=engine.device).outputs(z, class_ids).images
    first = None if class_ids is None else class_ids[:1]
    # Runtimes choose their kernels by the shape: many images and one are what a server runs.
    outputs = [engine.outputs(z, class_ids), engine.outputs(z[:1], first)]
    if not all(np.isfinite(found.images).all() for found in outputs):
        return Trial(problem="it gives values that are not finite")
    compared = Trial() if truth is None else _compare(engine.id, outputs, truth)
    return replace(compared, images_per_s=len(z) / _seconds(engine, z, class_ids))


def _compare(engine_id: EngineId, outputs: list[Outputs], truth: np.ndarray) -> Trial:
    """The distance from torch's images; torch itself, on whatever device, is what others are measured by."""
    found = agreement(outputs, truth)
    problem = "" if engine_id == TORCH else found.problem(TOLERANCES[engine_id.precision])
    return Trial(problem=problem, relative_l2=found.relative_l2, pixel_difference=found.pixel_difference)


def _seconds(engine: Engine, z: np.ndarray, class_ids: np.ndarray | None) -> float:
    times: list[float] = []
    while len(times) < CALLS and sum(times) < CALLS_S:
        start = time.perf_counter()
        engine(z, class_ids)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(main(*sys.argv[1:]))))
    except UniInstructError as error:
        sys.exit(str(error))
