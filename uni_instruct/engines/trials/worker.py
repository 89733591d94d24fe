"""Runs one engine of a bundle on its reference images, in a process of its own, as it may crash. Only torch engines need torch.

`trial.try_engine` calls it as `python -m uni_instruct.engines.trials.worker BUNDLE ENGINE_ID DEVICE`. The last line of its
output is the `Trial` as JSON.
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

# Time at most CALLS calls, and start none after CALLS_S seconds. The fastest counts, as other load only ever adds time.
CALLS, CALLS_S = 5, 1.0


def main(bundle_path: str, engine: str, device: str) -> Trial:
    """Run the trial and return its result. Raises only what says nothing about the engine: no package, too little memory."""
    bundle, engine_id = Bundle.open(bundle_path), EngineId.parse(engine)
    try:
        opened = load_engine(bundle, bundle.engines().get(engine_id, engine_id), device=device)
        return _try(bundle, opened)
    except (MissingExtraError, MemoryError, ModuleNotFoundError):
        raise
    except UniInstructError as error:
        return Trial(problem=error.problem)
    except Exception as error:  # the runtimes' errors have no narrower common class
        problem = " ".join(str(error).split())[:200]
        return Trial(problem=f"it raises {type(error).__name__}: {problem}")


def _try(bundle: Bundle, engine: Engine) -> Trial:
    reference = bundle.reference()
    seeds, class_ids = reference_inputs(bundle.spec)
    z = noise(seeds.tolist(), bundle.spec.noise_shape)
    truth = None if reference is None else reference.images
    if reference:
        z, class_ids = reference.noise(bundle.spec), reference.class_ids
    elif engine.id.target == COMPILED:  # a teacher has no reference.npz, but compiled engines have torch to compare with
        truth = load_engine(bundle, TORCH, device=engine.device).outputs(z, class_ids).images
    first = None if class_ids is None else class_ids[:1]
    # A runtime's kernels depend on the batch size, so try a large batch and a single image, as in a server.
    outputs = [engine.outputs(z, class_ids), engine.outputs(z[:1], first)]
    if not all(np.isfinite(found.images).all() for found in outputs):
        return Trial(problem="it returns NaN or infinite values")
    compared = Trial() if truth is None else _compare(engine.id, outputs, truth)
    return replace(compared, images_per_s=len(z) / _seconds(engine, z, class_ids))


def _compare(engine_id: EngineId, outputs: list[Outputs], truth: np.ndarray) -> Trial:
    """The distance from torch's images, and whether it is within tolerance. torch in fp32 is the reference, so it always is."""
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
