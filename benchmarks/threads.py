"""What it costs and gains how a runtime's threads wait for each other, and how they are laid out.

`python benchmarks/threads.py [BUNDLE] [--busy 0,1] [--batches 1,16,64] [--rounds 9]`: ONNX Runtime's threads spinning and
sleeping, each also bound to cores; OpenVINO's in one stream and in one a CPU, where the bundle has its engine. All take turns,
alone and beside that many processes that do nothing but count; figures are medians, ratios are taken within a round. The
machine's own load is printed with them: on one that has other work, "beside 0" is no idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from machine import describe_machine

from uni_instruct.bundle import Bundle
from uni_instruct.engine import EngineId, load_engine
from uni_instruct.engines.benchmark.measure import Contender, measure_interleaved, ratio, turns
from uni_instruct.engines.graph_ports import CLASS_IDS, IMAGES, NOISE
from uni_instruct.engines.hardware.threads import Threads, usable_cpus
from uni_instruct.generate import resolve_class_ids
from uni_instruct.noise import Inputs, draw_inputs
from uni_instruct.system.progress import progress

ONNX, OPENVINO = EngineId("onnx", "fp32"), "openvino"
SLEEPING = "onnx, sleeping"
LAYOUTS = {
    "onnx, spinning": {"spin": True},
    SLEEPING: {"spin": False},
    "onnx, spinning, pinned": {"spin": True, "pin": True},
    "onnx, sleeping, pinned": {"spin": False, "pin": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="digits")
    parser.add_argument("--busy", default="0,1", help="numbers of processes beside it")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    bundle, rows = Bundle.open(options.bundle), []
    batches = tuple(map(int, options.batches.split(",")))
    load = os.getloadavg()[0]
    for count in map(int, options.busy.split(",")):
        with busy_processes(count):
            rows += [{"beside": count, **row} for row in measure(bundle, batches, options.rounds)]
    result = {"generator": bundle.spec.name, "threads": usable_cpus(), "load_before": load, "rows": rows}
    print(json.dumps({**result, "machine": describe_machine()}, indent=2))


def measure(bundle: Bundle, batches: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """A row for each layout and batch size: images a second, and the ratio to threads of ONNX Runtime that sleep."""
    calls = {name: session_call(bundle, Threads(count=usable_cpus(), **words)) for name, words in LAYOUTS.items()}
    for engine_id, stored in bundle.engines().items():
        if engine_id.runtime == OPENVINO:
            for streams in sorted({1, usable_cpus()}):
                engine = load_engine(bundle, stored, streams=streams)
                calls[f"{engine_id}, {streams} streams"] = lambda inputs, engine=engine: engine(*inputs)

    def prepare(call: Callable[[Inputs], object], batch: int) -> Callable[[], object]:
        return partial(call, draw_inputs(bundle.spec, range(batch), resolve_class_ids(bundle.spec, range(batch))))

    contenders = [Contender(name=name, prepare=partial(prepare, call)) for name, call in calls.items()]
    with progress("threads", turns(contenders, batches, rounds), "figures") as bar:
        seconds = measure_interleaved(contenders, batches, rounds, 0.2, bar)
    return [
        {
            "layout": name,
            "batch": batch,
            "images_per_s": round(batch / statistics.median(own), 1),
            "to_sleeping": round(ratio(seconds[SLEEPING, batch], own), 2),
        }
        for (name, batch), own in seconds.items()
    ]


def session_call(bundle: Bundle, threads: Threads) -> Callable[[Inputs], object]:
    """The ONNX engine's graph with its threads so."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads.count, 1
    for key, value in threads.for_onnxruntime().items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(bundle.engines()[ONNX].file(), options, providers=["CPUExecutionProvider"])

    def call(inputs: Inputs) -> object:
        labels = {} if inputs.class_ids is None else {CLASS_IDS: inputs.class_ids}
        return session.run([IMAGES], {NOISE: inputs.noise, **labels})

    return call


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within, that many other processes want a core each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
