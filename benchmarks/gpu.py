"""Everything that only a GPU can show, in one run: parity of every engine, their speed, a short training; figures as JSON.

`make gpu`, or `python benchmarks/gpu.py [--device cuda:1] [--out gpu.json]`. Exits with 1 where an engine strays or something
fails; what could not be had (a package that is not installed) is named under "left_out". Under ten minutes on one GPU.
`--device cpu --smallest` goes the same way on any machine, in a minute or two.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engines import random_bundle, seconds_per_call
from machine import describe_machine

from uni_instruct.bundle import Bundle
from uni_instruct.engine import RUNTIMES, Engine, load_engine
from uni_instruct.engines.hardware.cuda import gpus
from uni_instruct.engines.hardware.device import CUDA, checked_device, device_index, device_type
from uni_instruct.engines.onnxruntime import PROVIDERS, OnnxEngine
from uni_instruct.engines.outputs import TOLERANCES, agreement
from uni_instruct.engines.torch import TorchEngine
from uni_instruct.errors import MissingExtraError, RequestError, UniInstructError
from uni_instruct.export.targets import export_engine, targets_here

SHIPPED, NETWORK = ("digits", "fashion-mnist", "emoji"), "cifar10"
BATCHES, ROUNDS = (1, 16, 64, 256), 3
TRAINING = {"32-true": ("teacher.duration_kimg=25.6", "distillation.duration_kimg=12.8")}
TRAINING |= dict.fromkeys(("bf16-mixed", "16-mixed"), TRAINING["32-true"])
SMALLEST_RECIPE = ("teacher.duration_kimg=0.256", "distillation.duration_kimg=0.128", "critic_warmup_kimg=0", "loop.samples=64")


@dataclass
class Figures:
    """What the run has found; problems end it with exit code 1, what was left out does not."""

    device: str
    parity: list[dict[str, object]] = field(default_factory=list)
    speed: list[dict[str, object]] = field(default_factory=list)
    training: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smallest", action="store_true", help="one generator, one round, the shortest training")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    try:
        figures = Figures(checked_device(options.device))
    except RequestError as error:
        sys.exit(f"error: {error}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        names = SHIPPED[:1] if options.smallest else (*SHIPPED, NETWORK)
        for name in names:
            tell(f"{name}: building engines and holding them against torch")
            run_generator(figures, name, Path(scratch, name), BATCHES[:1] if options.smallest else BATCHES, options.smallest)
        trained = {"32-true": SMALLEST_RECIPE} if options.smallest else TRAINING
        for precision, settings in trained.items():
            tell(f"training in {precision}")
            train(figures, Path(scratch, precision), precision, settings)
    figures.seconds = round(time.perf_counter() - start, 1)
    text = json.dumps({**asdict(figures), "machine": describe_machine(), "gpus": [gpu._asdict() for gpu in gpus()]}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(bool(figures.problems))


def run_generator(figures: Figures, name: str, path: Path, batches: tuple[int, ...], smallest: bool) -> None:
    """Parity and speed of every engine of one generator: a shipped one, whose weights are trained, or a random network."""
    bundle = (
        random_bundle(name, path, targets=()) if name == NETWORK else Bundle.open(shutil.copytree(Bundle.open(name).path, path))
    )
    for target in targets_here():
        if {CUDA, device_type(figures.device)} <= set(
            RUNTIMES[target.engine_id.runtime].devices
        ):  # OpenVINO is no matter of a GPU's
            attempt(figures, f"{name}: export {target.engine_id}", lambda t=target: export(bundle, str(t.engine_id), figures))
    opened: dict[str, Engine] = {}
    for engine_name, opener in openers(Bundle.open(path), figures.device).items():
        attempt(figures, f"{name}: open {engine_name}", lambda e=engine_name, o=opener: opened.update({e: o()}))
    for engine_name, engine in list(opened.items()):
        if not attempt(figures, f"{name}: {engine_name}", lambda e=engine_name, g=engine: compare(figures, bundle, name, e, g)):
            del opened[engine_name]
    measure(figures, name, opened, batches, 1 if smallest else ROUNDS)
    for engine in opened.values():
        engine.close()


def export(bundle: Bundle, engine_id: str, figures: Figures) -> None:
    start = time.perf_counter()
    record = export_engine(bundle, engine_id, figures.device)
    row = {"generator": bundle.spec.name, "engine": engine_id, "export_s": round(time.perf_counter() - start, 1)}
    figures.parity.append(row | {key: record.parity[key] for key in ("relative_l2", "psnr_db", "largest_pixel_difference")})


def openers(bundle: Bundle, device: str) -> dict[str, Callable[[], Engine]]:
    """What is to be tried: the exported engines, ONNX Runtime's by every provider, and torch in every precision."""
    made: dict[str, Callable[[], Engine]] = {}
    for engine_id, stored in bundle.engines().items():
        if device_type(device) not in RUNTIMES[engine_id.runtime].devices:
            continue
        if engine_id.runtime != "onnx":
            made[str(engine_id)] = lambda s=stored: load_engine(bundle, s, device=device)  # type: ignore[misc]
            continue
        for provider in (name for name, kind in PROVIDERS.items() if kind == device_type(device)):
            made[f"{engine_id} {provider}"] = lambda s=stored, p=provider: OnnxEngine(bundle, s, device=device, provider=p)  # type: ignore[misc]
    for precision in ("fp32", "bf16", "fp16"):
        made[f"torch-{precision}"] = lambda p=precision: TorchEngine(bundle, device=device, precision=p)  # type: ignore[misc]
    return made


def compare(figures: Figures, bundle: Bundle, name: str, engine_name: str, engine: Engine) -> None:
    """Adds the distance from torch's images. Raises UniInstructError where it is out of tolerance."""
    from uni_instruct.networks.reference import make_reference

    reference = bundle.reference() or make_reference(bundle)
    assert reference is not None
    z, first = reference.noise(bundle.spec), None if reference.class_ids is None else reference.class_ids[:1]
    found = agreement([engine.outputs(z, reference.class_ids), engine.outputs(z[:1], first)], reference.images)
    figures.parity.append({"generator": name, "engine": engine_name, **asdict(found)})
    if problem := found.problem(TOLERANCES[engine.id.precision]):
        raise UniInstructError(problem, remedy="do not use it here")


def measure(figures: Figures, name: str, engines: dict[str, Engine], batches: tuple[int, ...], rounds: int) -> None:
    """The engines take turns; medians over the rounds."""
    seconds: dict[tuple[str, int], list[float]] = {(engine, batch): [] for batch in batches for engine in engines}
    for _ in range(rounds):
        for (engine, batch), times in seconds.items():
            attempt(
                figures,
                f"{name}: {engine}, batch {batch}",
                lambda e=engine, b=batch, t=times: t.append(seconds_per_call(engines[e], b)),
            )
    for (engine, batch), times in seconds.items():
        if times:
            middle = statistics.median(times)
            row = {"generator": name, "engine": engine, "batch": batch, "latency_ms": round(middle * 1e3, 3)}
            figures.speed.append(row | {"images_per_s": round(batch / middle, 1)})


def train(figures: Figures, out: Path, precision: str, settings: tuple[str, ...]) -> None:
    """A short run of the digits recipe, from a teacher of its own, on the device."""
    visible = {"CUDA_VISIBLE_DEVICES": str(device_index(figures.device)) if device_type(figures.device) == "cuda" else ""}
    command = [
        sys.executable,
        "-m",
        "uni_instruct",
        "train",
        "digits",
        "--out",
        str(out),
        "--set",
        f"loop.precision={precision}",
    ]
    start = time.perf_counter()
    done = subprocess.run([*command, *settings], env=os.environ | visible, capture_output=True, text=True, check=False)
    row = {"precision": precision, "settings": settings, "seconds": round(time.perf_counter() - start, 1)}
    figures.training.append(row | {"exit_code": done.returncode})
    if done.returncode:
        figures.problems.append(f"training in {precision}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def attempt(figures: Figures, what: str, step: Callable[[], object]) -> bool:
    """Whether the step succeeded; else what it says is kept, and the run goes on."""
    try:
        step()
    except MissingExtraError as error:
        figures.left_out.append(f"{what}: {error}")
        return False
    except Exception as error:  # whatever a runtime raises, the others' figures are wanted
        figures.problems.append(f"{what}: {' '.join(str(error).split())[:300]}")
        tell(figures.problems[-1])
        return False
    return True


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
