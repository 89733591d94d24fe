"""The cache of compiled engines: machine code that torch's inductor makes of a network and its weights. Needs no torch.

A process of its own compiles. So the compiler's hundreds of megabytes are freed at its end, and settings that it changes in
torch do not affect other threads.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from uni_instruct import __version__
from uni_instruct.bundle import Bundle
from uni_instruct.engines.hardware.machine import machine
from uni_instruct.engines.hardware.threads import usable_cpus
from uni_instruct.engines.record import EngineId
from uni_instruct.engines.runtime import RUNTIMES
from uni_instruct.engines.worker_process import run_worker
from uni_instruct.errors import CompilationError, DiskError
from uni_instruct.system.files import atomic_file, cache_folder, disk_errors, locked, make_folder

_log = logging.getLogger(__name__)


def ensure_compiled(bundle: Bundle, engine_id: EngineId) -> Path | None:
    """Compile the engine unless the user's cache has it. Returns the path in the cache; None if the cache cannot be written.

    Raises CompilationError if the compiler fails.
    """
    try:
        path = compiled_path(bundle, engine_id)
        if path.is_file():
            return path
        with disk_errors(path):
            make_folder(path.parent, path)
        # Without a lock, all worker processes of a server would compile the same engine at once.
        with locked(path.with_suffix(".lock"), on_wait=lambda: _log.info("another process compiles %s ...", engine_id)):
            if not path.is_file():
                with atomic_file(path) as partial:
                    _compile(bundle, engine_id, partial)
    except (DiskError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _log.info("engine %s cannot be written to the cache, so every process compiles it again: %s", engine_id, error)
        return None
    return path


@contextmanager
def compiled_file(bundle: Bundle, engine_id: EngineId) -> Iterator[Path]:
    """Within the block, the compiled file exists: in the cache, or as a temporary file. Once loaded it is not read again."""
    kept = ensure_compiled(bundle, engine_id)
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="uni-instruct-compiled-") as folder:
        path = Path(folder) / f"{engine_id}.so"
        _compile(bundle, engine_id, path)
        yield path


def compiled_path(bundle: Bundle, engine_id: EngineId) -> Path:
    """The engine's path in the cache. Raises RuntimeError if there is no home directory.

    Its name holds a hash of all that the code depends on: weights, network, torch's version, processor, number of threads.
    """
    # Of a teacher only the denoiser is compiled, so the number of steps does not matter. Nor do names and provenance.
    steps = min(bundle.spec.steps, 2)
    spec = replace(bundle.spec, steps=steps, name="", class_names=(), provenance={}, licence="")
    facts = {
        "engine_id": str(engine_id),
        "weights_sha256": bundle.weights_sha256,
        "spec": asdict(spec),
        "runtime": RUNTIMES[engine_id.runtime].version(),
        "machine": machine(),
        "threads": usable_cpus(),
        "uni_instruct": __version__,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "compiled" / f"{engine_id}-{digest}.so"


def _compile(bundle: Bundle, engine_id: EngineId, path: Path) -> None:
    """Compile the engine to `path`. Inductor's other files go into a temporary folder."""
    _log.info("compiling engine %s for this processor, once; this takes half a minute to several minutes ...", engine_id)
    with tempfile.TemporaryDirectory(prefix="uni-instruct-compiling-") as scratch:
        made = Path(scratch) / "engine.so"
        done = run_worker(
            "uni_instruct.engines.compiled.torch_worker",
            [str(bundle.path.resolve()), str(engine_id), str(made)],
            lambda past_s: _log.info("compiling engine %s: %.0f s", engine_id, past_s),
            environment={"TORCHINDUCTOR_CACHE_DIR": scratch, "OMP_NUM_THREADS": str(usable_cpus())},
        )
        assert done is not None, "no time limit was set"
        if done.returncode or not made.is_file():
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise CompilationError(
                f"engine {engine_id} cannot be compiled here: {reason[:300]}",
                remedy=f"check the C++ compiler (environment variable CXX), or use --engine torch-{engine_id.precision}",
                param="engine",
            )
        with disk_errors(path):
            _copy(made, path)


def _copy(source: Path, path: Path) -> None:
    with source.open("rb") as read, path.open("wb") as written:
        while block := read.read(2**24):
            written.write(block)
        written.flush()
        os.fsync(written.fileno())
