"""Runs one exported engine in a process of its own, as a server would: no torch, everything from the files on disk.

Called by `parity.run_worker` as `python -m uni_instruct.export.parity_worker BUNDLE FOLDER ENGINE_ID DEVICE INPUTS OUTPUTS`,
the last two being npz files; an empty DEVICE leaves the choice to the engine.
"""

import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.engine import Engine, EngineId, load_engine
from uni_instruct.engines.hardware.threads import usable_cpus
from uni_instruct.engines.outputs import Outputs
from uni_instruct.errors import DiskError, UniInstructError
from uni_instruct.files import disk_errors
from uni_instruct.processes import release_large_blocks

SHORT = 8
TIMED_ROUNDS, TIMED_MS = 5, 2000.0  # whatever comes first


def main(bundle_path: str, folder: str, engine_id: str, device: str, inputs: str, outputs: str) -> None:
    """Writes, for each batch size b of the inputs, images_b, denoised_b and latency_ms_b (one batch, median); and machine."""
    bundle = Bundle.open(bundle_path)
    stored = bundle.engine_in(Path(folder), EngineId.parse(engine_id))
    open_engine = partial(load_engine, bundle, stored, device=device or None)
    engine = open_engine()
    with np.load(inputs) as data:
        noise, batches = data["noise"], data["batches"].tolist()
        class_ids = ClassMixture(data["class_ids"], data["other_ids"], data["share"]) if "share" in data else None
    results: dict[str, np.ndarray] = {}
    for batch in batches:
        if batch > 1 and batch == max(batches):  # a runtime may hold the weights once for few images and once for many
            engine.close()
            engine = open_engine()
        # The largest batch size sees all images, the others a few batches' worth.
        count = len(noise) if batch == max(batches) else max(batch, SHORT)
        parts = [slice(start, start + batch) for start in range(0, count, batch)]
        # Where no image of a call is mixed, it is made as most are: without a word of mixtures.
        calls = [(noise[part], None if class_ids is None else class_ids[part].simplified()) for part in parts]
        found, times_ms = zip(*(_timed(engine, *call) for call in calls), strict=True)
        results[f"images_{batch}"] = np.concatenate([one.pixels for one in found])
        results[f"denoised_{batch}"] = np.concatenate([one.images for one in found])
        results[f"latency_ms_{batch}"] = np.array(_latency_ms(engine, list(times_ms), *calls[0]))
    machine = f"{platform.machine()}, {usable_cpus()} CPU threads, {engine.device}"
    results["machine"] = np.array(machine)
    with disk_errors(Path(outputs)):
        np.savez(outputs, allow_pickle=False, **results)


def _timed(engine: Engine, noise: np.ndarray, class_ids: ClassIds | None) -> tuple[Outputs, float]:
    start = time.perf_counter()
    found = engine.outputs(noise, class_ids)
    return found, (time.perf_counter() - start) * 1e3


def _latency_ms(engine: Engine, times_ms: list[float], noise: np.ndarray, class_ids: ClassIds | None) -> float:
    """Median of the calls that were made, without the first one, which allocates, and of more where they were short."""
    while len(times_ms) <= TIMED_ROUNDS and sum(times_ms) < TIMED_MS:
        times_ms.append(_timed(engine, noise, class_ids)[1])
    return statistics.median(times_ms[1:] or times_ms)


if __name__ == "__main__":
    release_large_blocks()
    try:
        main(*sys.argv[1:])
    except DiskError as error:  # no fault of the engine's
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except UniInstructError as error:
        sys.exit(str(error))
