# ruff: noqa: E501
"""Engines, servers, publications and whole commands that are refused, and how each remedy is followed."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime

from builders.bundles import ONNX, random_bundle
from builders.paths import FORMAT_1
from builders.plans import TINY
from builders.remedies import first_choice
from builders.remedy_core import PIXELS, scored, statistics
from builders.remedy_stages import said
from builders.remedy_training import examined, teacher
from builders.remedy_values import GREY, Value, folder, found
from builders.vae import vae_spec
from uni_instruct.bundle import Bundle
from uni_instruct.cli import cli
from uni_instruct.data import open_dataset
from uni_instruct.data.storage import FolderStore
from uni_instruct.engine import TORCH_COMPILED, load_engine
from uni_instruct.engines import runtime
from uni_instruct.engines.benchmark.comparison import BenchmarkPlan, compare
from uni_instruct.engines.compiled.cache import compiled_path
from uni_instruct.engines.compiled.compiler import check_compiler
from uni_instruct.engines.onnxruntime import _checked_provider
from uni_instruct.engines.record import RECORD, EngineId
from uni_instruct.engines.runtime import RUNTIMES
from uni_instruct.export.api import export_bundle
from uni_instruct.export.openvino import _run_worker
from uni_instruct.export.publish import _check_replaceable, check_scores, publish, read_scores, rewrite_card
from uni_instruct.export.targets import export_engine
from uni_instruct.generate import mix_classes
from uni_instruct.networks import autoencoder
from uni_instruct.noise import noise
from uni_instruct.reference import REFERENCE
from uni_instruct.serve.load_test import TargetServer
from uni_instruct.system.progress import silent
from uni_instruct.train.pipeline import train
from uni_instruct.train.recipe import load_recipe


@cache
def _exported() -> Path:
    bundle = random_bundle(Path(mkdtemp()) / "bundle", 1)
    export_engine(bundle, str(ONNX))
    return bundle.path


def exported(tmp: Path) -> Path:
    """A bundle of the case's own with an engine."""
    if not (tmp / "bundle").exists():
        shutil.copytree(_exported(), tmp / "bundle")
    return tmp / "bundle"


def engine_file(tmp: Path, damage: Callable[[Path], object] | None = None) -> Path:
    """The engine's file, checked, after something was done to its folder."""
    engine = exported(tmp) / "engines" / str(ONNX)
    if damage is not None:
        damage(engine)
    return Bundle.open(exported(tmp)).engines()[ONNX].file()


def recorded(**changes: object) -> Callable[[Path], object]:
    return lambda engine: (engine / RECORD).write_text(json.dumps(json.loads((engine / RECORD).read_text()) | changes))


def export_as_said(tmp: Path, remedy: str) -> Path:
    run_command(found(r"'uni-instruct (.*?)'", remedy))
    return engine_file(tmp)


def mixed(tmp: Path, remedy: str = "") -> object:
    """A mixture of classes, by the engine that version 1 exported; or by the one that follows the remedy."""
    if not (tmp / "former").exists():
        shutil.copytree(FORMAT_1, tmp / "former")
    if remedy:
        run_command(found(r"'uni-instruct (.*?)'", remedy))
    bundle = Bundle.open(tmp / "former")
    engine = load_engine(bundle, bundle.engines()[ONNX])
    return engine(noise([7], bundle.spec.noise_shape), mix_classes(bundle.spec, 1, 3, 0.5))


def run_command(words: str) -> bool:
    cli.main(shlex.split(words), standalone_mode=False)
    return True


def reference(tmp: Path, **changes: Any) -> object:
    """The bundle's reference images, after some of them were changed."""
    path = exported(tmp) / REFERENCE
    if changes:
        with np.load(path) as kept:
            arrays = {name: kept[name] for name in kept.files}
        np.savez(path, **(arrays | changes))
    return Bundle.open(exported(tmp)).reference()


def cut_reference(tmp: Path) -> object:
    (exported(tmp) / REFERENCE).write_bytes(b"cut")
    return reference(tmp)


def anew(tmp: Path, remedy: str) -> object:
    assert remedy.endswith("writes it again")
    return export_as_said(tmp, remedy) and reference(tmp)


def device_for(engine_id: str, device: str | None) -> str:
    """Where an engine runs, on a machine without a GPU."""
    parsed = EngineId.parse(engine_id)
    with mock.patch.object(runtime, "gpus", return_value=()):
        return RUNTIMES[parsed.runtime].device_for(parsed, device)


def compiler(name: str) -> bool:
    with mock.patch.dict(os.environ, CXX=name):
        check_compiler()
    return True


def compiled_engine(tmp: Path, compiler_: str, engine_id: str = str(TORCH_COMPILED)) -> object:
    """That engine of a small bundle, with the cache in a folder of its own."""
    bundle = Bundle.open(tmp / "small") if (tmp / "small").exists() else random_bundle(tmp / "small", 1)
    with mock.patch.dict(os.environ, CXX=compiler_, XDG_CACHE_HOME=str(tmp)):
        return load_engine(bundle, EngineId.parse(engine_id))


def without_its_graph(tmp: Path, engine_id: str = "") -> object:
    """An engine for OpenVINO whose graph is gone before it is read; or the export of that engine."""
    bundle = random_bundle(tmp / "small", 1)
    if engine_id:
        return export_engine(bundle, engine_id)
    return _run_worker(bundle, "bf16", "convolutions in bf16", tmp / "graph.onnx", tmp / "engine.zip")


def kept_code(tmp: Path) -> Path:
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(tmp)):
        return compiled_path(Bundle.open(tmp / "small"), TORCH_COMPILED)


def without_code(tmp: Path) -> object:
    random_bundle(tmp / "small", 1)
    kept_code(tmp).parent.mkdir(parents=True)
    kept_code(tmp).write_bytes(b"no code")
    return compiled_engine(tmp, "g++")


def remove_code(tmp: Path) -> bool:
    kept_code(tmp).unlink()
    return True


def scores(tmp: Path, **score: object) -> Path:
    """What 'evaluate --json' printed, as far as a card needs it, with changes."""
    generator = {"weights_sha256": "a" * 64, "source": "x", "samples": 64, "values": {"FD": 1.0}} | score
    facts = {
        "reference": {"name": "digits", "samples": 1797},
        "extractor": {"name": "x", "sha256": "e"},
        "classes": "data",
        "seeds": "0-63",
    }
    (tmp / "s.json").write_text(json.dumps(facts | {"scores": {"generator": generator}}))
    return tmp / "s.json"


def evaluated(tmp: Path, remedy: str) -> object:
    """Scores that the command really prints."""
    assert "the output of 'uni-instruct evaluate GENERATOR --json'" in remedy
    bundle = random_bundle(tmp / "scored", 1)
    from click.testing import CliRunner

    answer = CliRunner().invoke(
        cli, ["evaluate", str(bundle.path), "--reference", "digits", "--metrics", "fd", "--seeds", "0-63", "--json"]
    )
    (tmp / "s.json").write_text(answer.stdout)
    return read_scores(tmp / "s.json")


def of_weights(tmp: Path, sha256: str | None) -> object:
    bundle = Bundle.open(tmp / "b") if (tmp / "b").exists() else random_bundle(tmp / "b", 1)
    check_scores([read_scores(scores(tmp, weights_sha256=sha256 or bundle.weights_sha256))], bundle, bundle)
    return True


@contextlib.contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server that gives one answer, once, unless it is asked with the key 'k'."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == "Basic Oms="
            self.send_response(200 if known else status)
            self.end_headers()
            facts = b'{"name": "digits", "engine": "onnx-fp32", "weights_sha256": "0"}'
            self.wfile.write(facts if known else body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"


def asked(key: bytes | None, status: int) -> object:
    with answering(status, "no key") as url:
        return TargetServer(url, key).facts(None) is not None


def nobody() -> object:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return TargetServer(f"http://127.0.0.1:{port}").facts(None)


def checked(tmp: Path) -> bool:
    return run_command(f"data check {tmp / 'x'}")


def removed(tmp: Path, remedy: str) -> bool:
    """What 'data check' names is removed."""
    assert "remove" in remedy
    (tmp / "x" / "b.png").unlink()
    return checked(tmp)


def listed_folder(tmp: Path, error: OSError | None) -> object:
    """The files of a folder whose listing fails with that error; as root every folder can be read."""
    store = FolderStore(folder(tmp, a_png=GREY))
    if error is None:
        return store.names()
    with mock.patch("os.scandir", side_effect=error):
        return store.names()


def trained(tmp: Path, out: str, *changes: str, teacher_only: bool = False) -> object:
    recipe = load_recipe(
        "digits", [*TINY, "loop.metric=none", "loop.report=false", "loop.trackers=[]", "loop.grid=4", *changes]
    )
    return train(recipe, tmp / out, teacher_only=teacher_only)


def without_its_teacher(tmp: Path) -> object:
    trained(tmp, "run", teacher_only=True)
    shutil.rmtree(tmp / "run" / "teacher")
    return trained(tmp, "run", teacher_only=True)


def benchmarked(batches: tuple[int, ...]) -> object:
    """A benchmark on a machine where a batch of 2 is too much."""
    plan = BenchmarkPlan(bundle=Bundle.open(_exported()), batches=batches, min_s=0.001, rounds=1, engines=("torch",))
    from uni_instruct.engines.benchmark import comparison

    original = comparison.draw_inputs

    def drawn(spec: Any, seeds: Any, class_ids: Any) -> Any:
        if len(seeds) == 2:
            return None  # the engine fails on it
        return original(spec, seeds, class_ids)

    with mock.patch.object(comparison, "draw_inputs", drawn):
        return compare(plan, silent)


def of_another_classifier(tmp: Path) -> object:
    made_by = {
        "extractor": "digits-classifier",
        "fingerprint": open_dataset("digits").fingerprint(),
        "extractor_sha256": "0" * 64,
    }
    return scored(statistics(tmp, **made_by), extractor="auto")


def shipped_teacher(tmp: Path) -> str:
    """The digits' generator as a teacher, whose weights are of real data."""
    shipped = Bundle.open("digits")
    bundle = Bundle.write(tmp / "real", dataclasses.replace(shipped.spec, steps=4), shipped.weights(), "test")
    return examined("teacher", f"teacher.bundle={bundle.path}")


def built(fault: str) -> object:
    """A decoder; fault: what torch says of its numbers, which a spec has let pass."""
    fails = mock.patch.object(autoencoder, "LatentDecoder", side_effect=ValueError(fault))
    with fails if fault else contextlib.nullcontext():
        return autoencoder.build_decoder(vae_spec())


R, PB, F = "uni_instruct/engines/record.py", "export/publish.py", "uni_instruct/reference.py"
ENGINES = [
    Value("uni_instruct/engines/benchmark/comparison.py", "{} failed at batch {}", lambda _: benchmarked((1, 2)), lambda remedy, _: benchmarked(said(remedy, "leave that batch out of --batches", (1,)))),
    Value(R, "(record)", lambda tmp: engine_file(tmp, recorded(weights_sha256="0" * 64)), lambda remedy, tmp: export_as_said(tmp, remedy)),
    Value(R, "{} describes engine {}", lambda tmp: engine_file(tmp, recorded(engine_id="openvino-fp32")), lambda remedy, tmp: export_as_said(tmp, remedy)),
    Value("uni_instruct/engines/compiled/cache.py", "engine {} cannot be compiled", lambda tmp: compiled_engine(tmp, "false"), lambda remedy, tmp: compiled_engine(tmp, "false", found(r"--engine (\S+)", remedy))),
    Value("export/openvino.py", "engine {} cannot be built", without_its_graph, lambda remedy, tmp: without_its_graph(tmp, found(r"such as (\S+)", remedy))),
    Value("uni_instruct/engines/compiled/torch_images.py", "{} cannot be loaded", without_code, lambda remedy, tmp: compiled_engine(tmp, said(remedy, "delete it", remove_code(tmp) and "g++"))),
    Value(R, "{} has no {}", lambda tmp: engine_file(tmp, lambda engine: next(engine.glob("*.onnx")).unlink()), lambda remedy, tmp: export_as_said(tmp, remedy)),
    Value(R, "{} does not match the sha256", lambda tmp: engine_file(tmp, lambda engine: next(engine.glob("*.onnx")).write_bytes(b"x")), lambda remedy, tmp: export_as_said(tmp, remedy)),
    Value("uni_instruct/engines/graph_ports.py", "engine {} was exported by an older version", mixed, lambda remedy, tmp: mixed(tmp, remedy)),
    Value(F, "{} cannot be read", cut_reference, lambda remedy, tmp: anew(tmp, remedy)),
    Value(F, "{} was made from other weights", lambda tmp: reference(tmp, weights_sha256=np.array("0" * 64)), lambda remedy, tmp: anew(tmp, remedy)),
    Value(F, "{} does not hold images of", lambda tmp: reference(tmp, images=np.zeros((1, 1, 4, 4), np.float32)), lambda remedy, tmp: anew(tmp, remedy)),
    Value("export/api.py", "target '{}' names several engines", lambda tmp: export_bundle(exported(tmp), "all"), lambda remedy, tmp: export_bundle(exported(tmp), first_choice(remedy))),
    Value("uni_instruct/evaluate/evaluator.py", "the statistics of {} were made by a", of_another_classifier, lambda remedy, _: scored(said(remedy, "the data set itself as --reference", "digits"))),
    Value("train/pipeline.py", "(train)", lambda tmp: trained(tmp, "run", teacher(tmp), teacher_only=True), lambda remedy, tmp: trained(tmp, "run", teacher_only=said(remedy, "leave out teacher.bundle", True))),
    Value("train/pipeline.py", "(train)", lambda tmp: trained(tmp, "run", teacher(tmp), teacher_only=True), lambda remedy, tmp: trained(tmp, "run", teacher(tmp), teacher_only=said(remedy, "leave out teacher.bundle or --teacher-only", False))),
    Value("train/pipeline.py", "{} is missing, although", without_its_teacher, lambda remedy, tmp: trained(tmp, said(remedy, "another --out", "other"), teacher_only=True)),
    Value(PB, "{} does not hold the scores", lambda tmp: read_scores(scores(tmp, values=None)), lambda remedy, tmp: evaluated(tmp, remedy)),
]  # fmt: skip
RUN = [
    Value(PB, "{} is not the folder of a published", lambda _: rewrite_card(Path("digits"), []), lambda remedy, tmp: rewrite_card(Path(publish(re.findall(r"publish (\w+) --out", remedy)[0], tmp / "p").path), [])),
    Value(PB, "{} lacks the hash", lambda tmp: read_scores(scores(tmp, weights_sha256=None)), lambda remedy, tmp: said(remedy, "--json'", read_scores(scores(tmp)))),
    Value(PB, "the scores of {} were measured on other weights", lambda tmp: of_weights(tmp, "b" * 64), lambda remedy, tmp: of_weights(tmp, said(remedy, "'uni-instruct evaluate' on the generator that is published", None))),
    Value(PB, "(_publish_teacher)", lambda tmp: publish(random_bundle(tmp / "t", 1, steps=2).path, tmp / "o", [scores(tmp)]), lambda remedy, tmp: publish(tmp / "t", tmp / "o", said(remedy, "leave --scores out", ()))),
    Value(PB, "{} exists, and is not", lambda tmp: _check_replaceable(tmp, random_bundle(tmp / "b", 1)), lambda remedy, tmp: _check_replaceable(tmp / said(remedy, "name another folder", "other"), Bundle.open(tmp / "b")) is None),
    Value("uni_instruct/engines/runtime.py", "engine {} does not run on", lambda _: device_for("openvino-fp32", "cuda:0"), lambda remedy, _: device_for("openvino-fp32", found(r"--device (\w+)", remedy))),
    Value("uni_instruct/engines/runtime.py", "engine {} needs a CUDA device", lambda _: device_for("torch-fp32", "cuda:0"), lambda remedy, _: device_for(said(remedy, "an engine of another runtime", "onnx-fp32"), None)),
    Value("uni_instruct/engines/onnxruntime.py", "no provider '{}' runs on", lambda _: _checked_provider(onnxruntime, "cpu", "CUDAExecutionProvider"), lambda remedy, _: _checked_provider(onnxruntime, "cpu", first_choice(remedy))),
    Value("uni_instruct/evaluate/extractors.py", "extractor {} exists in this process only", lambda _: PIXELS.required_file(), lambda remedy, _: said(remedy, "score without workers", scored())),
    Value("serve/load_test.py", "the server does not answer", lambda _: nobody(), lambda remedy, _: said(remedy, "start it", asked(b"k", 200))),
    Value("serve/load_test.py", "(facts)", lambda _: asked(None, 401), lambda remedy, _: asked(said(remedy, "UNI_INSTRUCT_API_KEY to its key", b"k"), 401)),
    Value("serve/load_test.py", "(facts)", lambda _: asked(None, 200), lambda remedy, _: asked(said(remedy, "of 'uni-instruct serve'", b"k"), 200)),
    Value("uni_instruct/engines/torch.py", "a teacher of {} steps runs", lambda tmp: load_engine(random_bundle(tmp / "t", 1, 4), EngineId("torch", "bf16")), lambda remedy, tmp: load_engine(Bundle.open(tmp / "t"), EngineId.parse(found(r"--engine (\S+)", remedy)))),
    Value("uni_instruct/engines/compiled/compiler.py", "compiled engines need a C++ compiler", lambda _: compiler("no-such-compiler"), lambda remedy, _: compiler(said(remedy, "set the environment variable CXX", "g++"))),
    Value("uni_instruct/networks/autoencoder.py", "the decoder cannot be built", lambda _: built("sides do not fit"), lambda remedy, _: built(said(remedy, "give another VAE", ""))),
    Value("uni_instruct/commands/data.py", "{}: {} file{} wrong", lambda tmp: folder(tmp, a_png=GREY, b_png=b"text") and checked(tmp), lambda remedy, tmp: removed(tmp, remedy)),
    Value("uni_instruct/data/storage.py", "(_walk)", lambda tmp: listed_folder(tmp, PermissionError(13, "")), lambda remedy, tmp: listed_folder(tmp, said(remedy, "make it readable", None))),
    Value("train/preflight.py", "(_teacher)", lambda tmp: examined("teacher", f"teacher.bundle={random_bundle(tmp / 'worse', 2, 4).path}"), lambda remedy, tmp: said(remedy, "a teacher that was trained on this data", shipped_teacher(tmp))),
]  # fmt: skip
