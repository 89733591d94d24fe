"""Runs one exported engine in a process of its own, as a server would: without torch, from the files on disk alone.

`parity.run_worker` calls it as `python -m uni_instruct.export.parity_worker BUNDLE FOLDER ENGINE_ID DEVICE INPUTS OUTPUTS`.
INPUTS and OUTPUTS are npz files. With an empty DEVICE, the engine's default device is used.
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
from uni_instruct.system.files import disk_errors
from uni_instruct.system.processes import release_large_blocks

# Batch sizes other than the largest run at least this many images.
SHORT = 8
# For the latency, batches are repeated until this many are timed, or until this much time has passed.
TIMED_ROUNDS, TIMED_MS = 5, 2000.0


def main(bundle_path: str, folder: str, engine_id: str, device: str, inputs: str, outputs: str) -> None:
    """Run the inputs at each batch size b, and write images_b, denoised_b, latency_ms_b (median, of one batch), and machine."""
    bundle = Bundle.open(bundle_path)
    stored = bundle.engine_in(Path(folder), EngineId.parse(engine_id))
    open_engine = partial(load_engine, bundle, stored, device=device or None)
    engine = open_engine()
    with np.load(inputs) as data:
        noise, batches = data["noise"], data["batches"].tolist()
        class_ids = ClassMixture(data["class_ids"], data["other_ids"], data["share"]) if "share" in data else None
    results: dict[str, np.ndarray] = {}
    for batch in batches:
        # A runtime may hold one copy of the weights for small batches and one for large ones: open it again to hold only one.
        if batch > 1 and batch == max(batches):
            engine.close()
            engine = open_engine()
        # Only the largest batch size runs all images; the others run one batch, or a few small ones.
        count = len(noise) if batch == max(batches) else max(batch, SHORT)
        parts = [slice(start, start + batch) for start in range(0, count, batch)]
        # A batch without mixtures is called as it usually is, with plain class ids.
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
    """Median time of a batch, without the first call, which allocates. Makes further calls if those of times_ms are too few."""
    while len(times_ms) <= TIMED_ROUNDS and sum(times_ms) < TIMED_MS:
        times_ms.append(_timed(engine, noise, class_ids)[1])
    return statistics.median(times_ms[1:] or times_ms)


if __name__ == "__main__":
    release_large_blocks()
    try:
        main(*sys.argv[1:])
    except DiskError as error:  # not the engine's fault: `run_worker` tells it by the exit code
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except UniInstructError as error:
        sys.exit(str(error))
