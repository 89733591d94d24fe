"""Export: the engine agrees with torch on shapes and classes of every kind, and one that does not is never admitted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from builders.bundles import ONNX, random_bundle
from builders.machine import files_of_at_most
from builders.paths import ROOT
from uni_instruct.bundle import WEIGHTS, Bundle
from uni_instruct.engines.onnxruntime import OnnxEngine
from uni_instruct.engines.outputs import TOLERANCES
from uni_instruct.engines.record import EngineRecord
from uni_instruct.engines.torch import TorchEngine
from uni_instruct.errors import DiskError, MissingExtraError, ParityError, RequestError
from uni_instruct.export import graph, parity
from uni_instruct.export import onnxruntime as onnxruntime_target
from uni_instruct.export.targets import TARGETS, export_engine
from uni_instruct.noise import noise
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]


BUNDLES = ["exported_bundle", "odd_bundle", pytest.param("patched_bundle", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def odd_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Unconditional, colour, higher than wide, of a network that sees squares of pixels as one, with its onnx engine."""
    path = tmp_path_factory.mktemp("bundles") / "odd"
    bundle = random_bundle(path, seed=5, num_classes=0, image_shape=(3, 24, 16), patch=2)
    export_engine(bundle, "onnx-fp32")
    return bundle


@pytest.fixture(scope="module")
def patched_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Conditional, in colour, of a network that sees squares of pixels as one, with its onnx engine."""
    path = tmp_path_factory.mktemp("bundles") / "patched"
    bundle = random_bundle(path, seed=6, image_shape=(3, 16, 12), patch=2)
    export_engine(bundle, "onnx-fp32")
    return bundle


@pytest.fixture
def unexported(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@pytest.fixture
def exported(exported_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize("batch", [1, 2, 5, 40])
def test_the_engine_agrees_with_torch(name: str, batch: int, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    count, classes = 40, bundle.spec.num_classes
    z = noise(range(10**12, 10**12 + count), bundle.spec.noise_shape)
    class_ids = np.arange(count) % classes if classes else None
    engine, torch_engine = OnnxEngine(bundle, bundle.engines()[ONNX]), TorchEngine(bundle)
    expected = torch_engine.outputs(z, class_ids).images
    parts = [slice(start, start + batch) for start in range(0, count, batch)]
    calls = [(z[part], None if class_ids is None else class_ids[part]) for part in parts]
    found = np.concatenate([engine.outputs(*call).images for call in calls])
    assert found.std() > 0.05
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    images = np.concatenate([engine(*call) for call in calls])
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - torch_engine(z, class_ids)).max() <= 1
    if class_ids is not None:
        assert (engine(z, class_ids) != engine(z, (class_ids + 1) % classes)).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("name", BUNDLES)
def test_the_record_says_what_was_built_and_how_well_it_agrees(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    folder = bundle.engine_folder(ONNX)
    record = EngineRecord.read(folder)
    assert sorted(os.listdir(folder)) == sorted(["engine.json", record.file])
    assert sorted(os.listdir(folder.parent)) == ["onnx-fp32"]
    assert record.file_sha256 == sha256(folder / record.file)
    assert record.weights_sha256 == sha256(bundle.path / WEIGHTS)
    assert set(record.versions) == {"uni_instruct", "torch", "onnx", "onnxscript", "onnxruntime"}
    report = record.parity
    assert report["tolerance"] == {"relative_l2": 1e-5, "pixel_difference": 1, "psnr_db": 0.0}
    assert 0 < report["mean_difference"] < report["largest_difference"] < 1e-4
    assert 0 < report["relative_l2"] < 1e-5
    assert report["equal_pixels"] > 0.99
    assert report["batches"] == [1, 2, 7, 64]
    assert report["batch_invariant"] is True
    assert report["finite"] is True
    assert report["images"] == 64
    assert report["classes"] == bundle.spec.num_classes
    assert all(latency > 0 for latency in report["latency_ms"].values())


@pytest.mark.parametrize("batch", [1, 2, 5, 40])
def test_whoever_feeds_noise_and_classes_alone_gets_whole_classes(exported_bundle: Bundle, batch: int) -> None:
    """By onnxruntime itself: the two ports of mixtures have defaults, so that programs that know nothing of them go on."""
    session = onnxruntime.InferenceSession(exported_bundle.engines()[ONNX].file(), providers=["CPUExecutionProvider"])
    assert [port.name for port in session.get_inputs()] == ["noise", "class_ids"]
    assert sorted(port.name for port in session.get_overridable_initializers()) == ["other_ids", "share"]
    inputs = {"noise": noise(range(batch), exported_bundle.spec.noise_shape), "class_ids": np.arange(batch) % 10}
    told = inputs | {"other_ids": (inputs["class_ids"] + 1) % 10, "share": np.zeros(batch, np.float32)}
    images, denoised = session.run(["images", "denoised"], inputs)
    np.testing.assert_array_equal(images, OnnxEngine(exported_bundle, exported_bundle.engines()[ONNX])(*inputs.values()))
    np.testing.assert_array_equal(denoised, session.run(["denoised"], told)[0])
    assert (
        (denoised != session.run(["denoised"], told | {"share": np.full(batch, 0.5, np.float32)})[0]).any(axis=(1, 2, 3)).all()
    )


@pytest.mark.parametrize("name", BUNDLES)
def test_the_file_stands_alone(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    path = bundle.engine_folder(ONNX) / EngineRecord.read(bundle.engine_folder(ONNX)).file
    model = onnx.load(path, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["uni_instruct.spec"]) == json.loads(json.dumps(asdict(bundle.spec)))
    assert properties["uni_instruct.weights_sha256"] == bundle.weights_sha256
    assert [entry.version for entry in model.opset_import if not entry.domain] == [20]
    channels, height, width = bundle.spec.image_shape
    ports = {port.name: _shape(port) for port in (*model.graph.input, *model.graph.output)}
    expected = {
        "noise": ["batch", channels, height, width],
        "images": ["batch", height, width, channels],
        "denoised": ["batch", channels, height, width],
    }
    classes = {"class_ids": ["batch"], "other_ids": ["mixed"], "share": ["mixed"]} if bundle.spec.num_classes else {}
    assert ports == expected | classes
    content = path.read_bytes()
    for trace in (b"site-packages", b".py", b"line ", str(ROOT).encode(), b"stack_trace"):
        assert trace not in content


def test_the_same_bundle_gives_the_same_file_again(exported: Bundle, cli: Cli) -> None:
    before = EngineRecord.read(exported.engine_folder(ONNX))
    code, output, errors = cli("export", exported.path, "--to", "onnx", "--json")
    (record,) = json.loads(output)
    assert (code, errors) == (0, "")
    assert record["file_sha256"] == before.file_sha256
    assert record == json.loads((exported.engine_folder(ONNX) / "engine.json").read_text())


def faithful(model: onnx.ModelProto) -> None:
    """The engine as it is."""


def wrong_weight(model: onnx.ModelProto) -> None:
    """One filter of the first convolution is wrong by 1 percent of its size."""
    tensor = next(t for t in model.graph.initializer if t.name.endswith("8x8_conv.weight"))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] *= 1.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def not_a_number(model: onnx.ModelProto) -> None:
    """One weight is NaN."""
    tensor = next(t for t in model.graph.initializer if t.name.endswith("8x8_conv.bias"))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def upside_down(model: onnx.ModelProto) -> None:
    """The uint8 images are upside down; the values before rounding still agree."""
    node = next(node for node in model.graph.node if "images" in node.output)
    node.output[list(node.output).index("images")] = "upright"
    inputs = {"flip_starts": -1, "flip_ends": -(2**31), "flip_axes": 1, "flip_steps": -1}
    tensors = [onnx.numpy_helper.from_array(np.array([value]), name) for name, value in inputs.items()]
    model.graph.initializer.extend(tensors)
    model.graph.node.append(onnx.helper.make_node("Slice", ["upright", *inputs], ["images"]))


def whole_classes(model: onnx.ModelProto) -> None:
    """The ends are right, and between them is nothing: the nearer class's share is made 1."""
    reader = next(node for node in model.graph.node if "share" in node.input)
    reader.input[list(reader.input).index("share")] = "rounded"
    model.graph.node.insert(0, onnx.helper.make_node("Round", ["share"], ["rounded"]))


def other_output(model: onnx.ModelProto) -> None:
    """The graph has another interface."""
    model.graph.output[1].name = model.graph.node[0].output[0]


def build_altered(source: Bundle, alter: Callable[[onnx.ModelProto], None]) -> Callable[[Bundle, Path, str], dict[str, str]]:
    """A build that writes the engine of `source`, altered: exporting anew takes ten times as long."""

    def build(bundle: Bundle, path: Path, precision: str) -> dict[str, str]:
        folder = source.engine_folder(ONNX)
        model = onnx.load(folder / EngineRecord.read(folder).file)
        alter(model)
        onnx.save(model, path)
        return {}

    return build


WRONG_BUILDS = {
    wrong_weight: "images of the onnx-fp32 engine differ from torch's by",
    not_a_number: "the onnx-fp32 engine or torch returns NaN or infinite values",
    upside_down: "a pixel of the onnx-fp32 engine differs from torch's by",
    whole_classes: "images of the onnx-fp32 engine differ from torch's by",
    other_output: "the onnx-fp32 engine failed to run: ",
}


@pytest.mark.parametrize("wrong", WRONG_BUILDS)
def test_an_engine_that_disagrees_is_not_admitted(
    wrong: Any, unexported: Bundle, exported_bundle: Bundle, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_target, "build", build_altered(exported_bundle, wrong))
    code, output, errors = cli("export", unexported.path, "--to", "onnx")
    assert (code, output) == (1, "")
    assert WRONG_BUILDS[wrong] in errors
    *steps, last = errors.splitlines()
    assert steps[0] == "export onnx-fp32: 0/2 steps (build, check)"
    assert all(line.startswith("export onnx-fp32: ") for line in steps)
    assert last.startswith("error: ")
    assert not (unexported.path / "engines").exists()
    monkeypatch.setattr(onnxruntime_target, "build", build_altered(exported_bundle, faithful))
    assert cli("export", unexported.path, "--to", "onnx")[0] == 0


def test_a_failed_check_names_the_worst_image_and_the_layer_that_differs(
    unexported: Bundle, exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_target, "build", build_altered(exported_bundle, wrong_weight))
    with pytest.raises(ParityError, match=r"\(worst seed \d+\); the first layer that differs is \S+ \(") as caught:
        export_engine(unexported, "onnx-fp32")
    assert re.search(r"differs is \S*8x8_conv \(relative L2 ", str(caught.value))
    assert not (unexported.path / "engines").exists()


def test_a_failed_export_keeps_the_engine_that_was_there(
    exported: Bundle, exported_bundle: Bundle, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = EngineRecord.read(exported.engine_folder(ONNX))
    monkeypatch.setattr(onnxruntime_target, "build", build_altered(exported_bundle, wrong_weight))
    with pytest.raises(ParityError):
        export_engine(exported, "onnx-fp32")
    with files_of_at_most(100_000):
        code, _, errors = cli("export", exported.path, "--to", "onnx", "--json")
    assert code == 2
    assert "cannot write" in errors
    assert errors.count("\n") == 1
    assert EngineRecord.read(exported.engine_folder(ONNX)) == record
    assert OnnxEngine(exported, exported.engines()[ONNX])(noise([1], exported.spec.noise_shape), np.array([1])).any()
    assert os.listdir(exported.path / "engines") == ["onnx-fp32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BUNDLE"], "Missing option '--to'"),
        (["BUNDLE", "--to", "coreml"], "'coreml' is not"),
        (["missing", "--to", "onnx"], "there is no bundle missing"),
        (["TEACHER", "--to", "onnx"], "is a teacher of 4 steps, not a one-step generator; export the generator"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: list[str], message: str, tiny_bundle: Bundle, tiny_teacher: Bundle, cli: Cli
) -> None:
    paths = {"BUNDLE": tiny_bundle.path, "TEACHER": tiny_teacher.path}
    code, output, errors = cli("export", *(paths.get(argument, argument) for argument in arguments))
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


def test_a_teacher_is_refused_by_the_library_too(tiny_teacher: Bundle) -> None:
    with pytest.raises(RequestError, match="not a one-step generator"):
        export_engine(tiny_teacher, "onnx-fp32")


def test_dry_run_says_what_would_be_built_and_builds_nothing(unexported: Bundle, exported_bundle: Bundle, cli: Cli) -> None:
    code, output, _ = cli("export", unexported.path, "--to", "onnx", "--to", "onnx", "--dry-run", "--json")
    (plan,) = json.loads(output)
    assert code == 0
    assert not plan["replaces"]
    assert not (unexported.path / "engines").exists()
    built = EngineRecord.read(exported_bundle.engine_folder(ONNX))
    assert Path(plan["path"]).name == built.file == "tiny-8x8-onnx-fp32.onnx"
    _, output, _ = cli("export", exported_bundle.path, "--to", "onnx", "--dry-run")
    assert output.startswith("would build ")
    assert "replacing the engine there" in output


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_missing_package_names_the_extra(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, target.packages[-1], None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'uni-instruct\[{target.extra}\]'"):
        target.check_packages()


def test_an_engine_whose_tools_fail_keeps_no_other_from_being_built(
    unexported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that quantizes finds no graph; the engine after it is built."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from uni_instruct.export import openvino as builder
    from uni_instruct.export.commands.export import _build

    def without_its_graph(bundle: Bundle, precision: str, way: str, graph: Path, path: Path) -> None:
        graph.unlink()
        run_worker(bundle, precision, way, graph, path)

    run_worker = builder._run_worker
    monkeypatch.setattr(builder, "_run_worker", without_its_graph)
    records, failures = _build(unexported, [TARGETS["openvino-int8"], TARGETS["openvino-fp32"]], None, True)
    assert [record.engine_id for record in records] == ["openvino-fp32"]
    assert [str(failure).partition(":")[0] for failure in failures] == ["engine openvino-int8 cannot be built here"]
    assert [str(engine_id) for engine_id in unexported.engines()] == ["openvino-fp32"]


def test_a_file_name_is_safe_whatever_the_generator_is_called(tiny_bundle: Bundle) -> None:
    names = {"../etc/passwd": "etc-passwd", "a b/c": "a-b-c", "...": "generator", "": "generator", "ümlaut": "mlaut"}
    for name, start in names.items():
        bundle = Bundle(tiny_bundle.path, replace(tiny_bundle.spec, name=name), "")
        assert TARGETS["onnx-fp32"].file_name(bundle) == f"{start}-8x8-onnx-fp32.onnx"


def test_a_generator_that_no_file_can_hold_is_refused(unexported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(RequestError, match="one ONNX file can hold at most 100000; use --engine torch-fp32"):
        export_engine(unexported, "onnx-fp32")


def test_the_report_is_the_worst_over_all_batches(tiny_bundle: Bundle) -> None:
    seeds, (pixels, denoised) = list(range(64)), _random_images()
    report = parity.compare(seeds, tiny_bundle.spec, _results(pixels, denoised), pixels, denoised, TOLERANCE)
    exact = (report.relative_l2, report.largest_difference, report.equal_pixels, report.largest_pixel_difference)
    assert exact == (0, 0, 1, 0)
    assert report.batch_invariant
    results = _results(pixels, denoised)
    results["denoised_7"][3, 0, 2, 2] += 0.5
    results["images_2"][1, 0, 0, 0] ^= 128
    results["denoised_64"][9] -= 0.25
    report = parity.compare(seeds, tiny_bundle.spec, results, pixels, denoised, TOLERANCE)
    assert report.largest_difference == pytest.approx(0.5)
    assert report.mean_difference == pytest.approx(0.25 / 64)
    assert report.relative_l2 == pytest.approx(max(0.5 / np.linalg.norm(denoised[:14]), 2 / np.linalg.norm(denoised)))
    assert report.equal_pixels == 1 - 1 / (8 * 64)
    assert report.largest_pixel_difference == 128
    assert report.worst_seed == 9
    assert not report.batch_invariant


TOLERANCE = TOLERANCES["fp32"]


def _random_images() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (64, 8, 8, 1), np.uint8), random.normal(size=(64, 1, 8, 8)).astype(np.float32)


def _results(pixels: np.ndarray, denoised: np.ndarray) -> dict[str, np.ndarray]:
    results = {"machine": np.array("here")}
    for batch, count in ((1, 8), (2, 8), (7, 14), (64, 64)):
        results |= {f"images_{batch}": pixels[:count].copy(), f"denoised_{batch}": denoised[:count].copy()}
        results[f"latency_ms_{batch}"] = np.array(1.0)
    return results


def _shape(port: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]


def test_a_heavy_network_is_tried_with_classes_from_first_to_last() -> None:
    """Each of ImageNet's thousand classes would be hours of torch."""
    args = {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": []}
    light = ModelSpec(name="small", noise_shape=(3, 8, 8), num_classes=1000, network_args=args)
    heavy = replace(light, noise_shape=(3, 64, 64))
    seeds, mixture = parity.fresh_inputs(heavy, "0" * 64)
    assert mixture is not None
    assert len(seeds) == len(mixture) == 32
    assert mixture.class_ids.tolist() == [1000 * place // 32 for place in range(32)]
    _, all_classes = parity.fresh_inputs(light, "0" * 64)
    assert all_classes is not None
    assert set(all_classes.class_ids.tolist()) == set(range(1000))


@pytest.mark.parametrize("taken", [36_000, 60_000], ids=["room for the noise alone", "no room"])
def test_no_room_for_temporary_files_is_no_fault_of_the_engine(
    taken: int, exported_bundle: Bundle, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "full").write_bytes(bytes(taken))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    record = exported_bundle.engines()[ONNX].record()
    seeds, class_ids = parity.fresh_inputs(exported_bundle.spec, record.file_sha256)
    z = noise(seeds, exported_bundle.spec.noise_shape)
    with pytest.raises(DiskError, match=r"^cannot write \S+: No space left on device; free space, or "):
        parity.run_worker(exported_bundle, ONNX, exported_bundle.engine_folder(ONNX), z, class_ids)
    assert os.listdir(small_disk) == ["full"]


def test_a_scheduler_that_ends_an_export_finds_nothing_half_written(unexported: Bundle) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "uni_instruct",
        "export",
        str(unexported.path),
        "--to",
        "onnx",
        "--precision",
        "fp32",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        engines = unexported.path / "engines"
        while process.poll() is None and not (engines.is_dir() and os.listdir(engines)):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "error: interrupted; run the same command again to continue"
    assert not engines.exists()
