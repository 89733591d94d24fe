"""Engines: torch-free where promised, byte-equal whatever the batch where promised, and nothing altered is ever run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.bundles import ONNX, random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.engine import RUNTIMES, TORCH, EngineId, available_engines, open_engine
from uni_instruct.engines import onnxruntime as onnx_engine
from uni_instruct.engines.onnxruntime import OnnxEngine
from uni_instruct.engines.record import RECORD, EngineRecord
from uni_instruct.errors import BundleError, MissingExtraError, RequestError
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.noise import noise
from uni_instruct.system.files import sha256

BATCHES = (1, 2, 3, 7, 16, 64)
SEEDS = list(range(70))


@pytest.fixture
def exported(exported_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))


def images_of(bundle: Bundle, kind: str, batch: int, seeds: list[int] = SEEDS) -> np.ndarray:
    return generate_images(open_engine(bundle, kind), seeds, resolve_class_ids(bundle.spec, seeds), batch)


def test_onnx_gives_the_same_bytes_whatever_the_batch(exported_bundle: Bundle) -> None:
    alone = images_of(exported_bundle, "onnx", 1)
    assert len(np.unique(alone, axis=0)) == len(SEEDS)
    for batch in BATCHES:
        np.testing.assert_array_equal(images_of(exported_bundle, "onnx", batch), alone)


def test_torch_on_the_cpu_agrees_within_a_level_whatever_the_batch(exported_bundle: Bundle) -> None:
    """Its kernels choose their summation order by the batch: docs/export.md says so."""
    seeds = SEEDS[:20]
    alone = images_of(exported_bundle, "torch", 1, seeds).astype(int)
    for batch in (2, 7, 20):
        difference = np.abs(images_of(exported_bundle, "torch", batch, seeds) - alone)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_the_same_batches_give_the_same_bytes_on_every_engine(exported_bundle: Bundle) -> None:
    for kind in available_engines(exported_bundle):
        np.testing.assert_array_equal(images_of(exported_bundle, kind, 16), images_of(exported_bundle, kind, 16))


def test_engines_agree_within_a_level(exported_bundle: Bundle) -> None:
    reference = images_of(exported_bundle, "torch", 16).astype(int)
    for kind in available_engines(exported_bundle):
        assert np.abs(images_of(exported_bundle, kind, 16) - reference).max() <= 1


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_results_are_fresh_arrays(kind: str, exported_bundle: Bundle) -> None:
    engine = open_engine(exported_bundle, kind)
    z = noise([1, 2], exported_bundle.spec.noise_shape)
    first = engine(z, np.array([1, 2]))
    kept = first.copy()
    first_noise = z.copy()
    engine(noise([3, 4], exported_bundle.spec.noise_shape), np.array([3, 4]))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(z, first_noise)
    first[...] = 0  # the caller's own, to write to


@pytest.mark.parametrize("kind", ["onnx"])
def test_an_engine_needs_no_torch(kind: str, exported_bundle: Bundle, tmp_path: Path) -> None:
    expected = images_of(exported_bundle, kind, 64)
    script = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import numpy as np
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids
engine = open_engine(sys.argv[1], sys.argv[2])
seeds = list(range(70))
np.save(sys.argv[3], generate_images(engine, seeds, resolve_class_ids(engine.spec, seeds), 64))
assert "torch" not in sys.modules
"""
    result = tmp_path / "images.npy"
    command = [sys.executable, "-c", script, str(exported_bundle.path), kind, str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(np.load(result), expected)


def test_the_fastest_engine_that_was_exported_is_opened(exported_bundle: Bundle, tiny_bundle: Bundle) -> None:
    assert open_engine(exported_bundle).id == ONNX
    assert open_engine(tiny_bundle).id == TORCH
    assert available_engines(exported_bundle) == [ONNX, TORCH]
    with pytest.raises(RequestError, match=r"has no onnx engine; uni-instruct export .* --to onnx"):
        open_engine(tiny_bundle, "onnx")
    with pytest.raises(
        RequestError, match=f"engine 'gpu' is unknown; choose one of {', '.join(RUNTIMES)}, torch-fp32, torch-bf16"
    ):
        open_engine(tiny_bundle, "gpu")


@pytest.mark.parametrize(
    ("text", "engine_id"),
    [
        ("onnx-fp32", EngineId("onnx", "fp32")),
        ("torch-fp32", TORCH),
        ("openvino-bf16", EngineId("openvino", "bf16")),
        ("tensorrt-fp16-sm90", EngineId("tensorrt", "fp16", "sm90")),
        ("tensorrt-rtx-fp16-sm120", EngineId("tensorrt-rtx", "fp16", "sm120")),
    ],
)
def test_an_engine_id_is_written_as_it_is_read(text: str, engine_id: EngineId) -> None:
    assert EngineId.parse(text) == engine_id
    assert str(engine_id) == text


@pytest.mark.parametrize("text", ["", "onnx", "fp32", "onnx-fp33", "onnx-fp32-", "Onnx-fp32", "../onnx-fp32", "onnx-fp32-a/b"])
def test_what_is_no_engine_id_is_refused(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"is not an engine id; write RUNTIME-PRECISION .*, such as onnx-fp32 or tensorrt-fp16-sm90"
    ):
        EngineId.parse(text)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("abacus-fp32", f"engine 'abacus-fp32' is unknown; choose one of {', '.join(RUNTIMES)}, "),
        ("onnx-fp16", "has no onnx-fp16 engine; choose one of "),
        ("torch-fp16", "has no torch-fp16 engine; choose one of "),
    ],
)
def test_an_engine_that_is_not_there_is_never_another(wanted: str, message: str, exported_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match=f"{message}onnx-fp32, torch-fp32, torch-bf16"):
        open_engine(exported_bundle, wanted)


def edit_record(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text()) | changes
        (folder / RECORD).write_text(json.dumps(record))

    return edit


def replace_file(content: bytes) -> Callable[[Path], None]:
    """Another file, whose hash engine.json knows."""

    def edit(folder: Path) -> None:
        path = folder / EngineRecord.read(folder).file
        path.write_bytes(content)
        edit_record(file_sha256=sha256(path))(folder)

    return edit


def flip_bit(folder: Path) -> None:
    path = folder / EngineRecord.read(folder).file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What happened to the engine -> what the user is told.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "altered": (flip_bit, "does not match the sha256 in engine.json; run 'uni-instruct export"),
    "file missing": (lambda folder: (folder / EngineRecord.read(folder).file).unlink(), "has no tiny-8x8-onnx-fp32.onnx"),
    "other weights": (edit_record(weights_sha256="0" * 64), "was built from other weights than those in"),
    "outside its folder": (edit_record(file="../../model.safetensors"), "names '../../model.safetensors' as the engine's file"),
    "file no name": (edit_record(file=None), "names None as the engine's file"),
    "record truncated": (lambda folder: (folder / RECORD).write_text('{"kind": "on'), "is not a valid engine record"),
    "record binary": (lambda folder: (folder / RECORD).write_bytes(bytes(range(256))), "is not a valid engine record"),
    "record foreign": (lambda folder: (folder / RECORD).write_text("[1, 2]"), "is not a valid engine record"),
    "no report": (edit_record(parity=None), "is not a valid engine record"),
    "report of nothing": (edit_record(parity={"images": 64}), "is not a valid engine record"),
    "file too long": (edit_record(file="x" * 5000), "names 'xxx"),
    "file above": (edit_record(file=".."), "names '..' as the engine's file"),
    "file empty": (edit_record(file=""), "names '' as the engine's file"),
    "record nested too deeply": (lambda folder: (folder / RECORD).write_text("[" * 200_000), "is not a valid engine record"),
    "record too large": (lambda folder: (folder / RECORD).open("ab").truncate(2**33), "is not a valid engine record"),
    "record a folder": (lambda folder: [(folder / RECORD).unlink(), (folder / RECORD).mkdir()], "is not a valid engine record"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_engine_is_one_line_and_never_runs(
    damage: str, exported: Bundle, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    inflict, message = DAMAGE[damage]
    inflict(exported.engine_folder(ONNX))
    code, output, errors = cli("generate", exported.path, "--seeds", "0-3", "--out", tmp_path / "out")
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("value", [None, "text", [], float("nan"), True])
@pytest.mark.parametrize("key", ["images", "relative_l2", "equal_pixels", "batch_invariant", "machine", "latency_ms"])
def test_a_report_that_was_edited_is_told_with_the_export_that_mends_it(
    key: str, value: object, exported: Bundle, cli: Callable[..., tuple[int, str, str]]
) -> None:
    good = exported.engines()[ONNX].record().parity
    if type(good[key]) is type(value) is not float:  # type: ignore[literal-required]
        value = 7
    edit_record(parity={**good, key: value})(exported.engine_folder(ONNX))
    code, output, errors = cli("inspect", exported.path)
    assert (code, errors) == (0, "")
    assert "engine onnx-fp32: cannot be used: " in output
    with pytest.raises(BundleError, match=f"run 'uni-instruct export {exported.path} --to onnx --precision fp32' again"):
        exported.engines()[ONNX].record()


@pytest.mark.parametrize("changes", [{"way": 7}, {"way": ["x"]}, {"versions": {"onnx": 7}}, {"file_sha256": 7}])
def test_a_record_with_a_value_of_another_type_is_refused(changes: dict[str, Any], exported: Bundle) -> None:
    edit_record(**changes)(exported.engine_folder(ONNX))
    with pytest.raises(BundleError, match="is not a valid engine record"):
        exported.engines()[ONNX].record()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("onnx-fp16", "--to onnx --precision fp16"),
        ("tensorrt-rtx-bf16-sm89", "--to tensorrt-rtx --precision bf16 --sm 89"),
        ("torch-fp32-compiled", "--to torch --precision fp32"),
    ],
)
def test_an_engine_is_exported_again_and_nothing_beside_it(text: str, options: str, exported_bundle: Bundle) -> None:
    engine_id = EngineId.parse(text)
    stored = exported_bundle.engine_in(exported_bundle.engine_folder(engine_id), engine_id)
    with pytest.raises(BundleError, match=rf"export \S+ {options}' again"):
        stored.record()


@pytest.mark.parametrize("content", [b"", b"\x00not onnx" * 100])
def test_a_file_that_is_no_graph_is_one_line_and_never_runs(
    content: bytes, exported: Bundle, tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace_file(content)(exported.engine_folder(ONNX))
    options = ("--seeds", "0-3", "--out", tmp_path / "out", "--engine", "onnx-fp32")
    code, output, errors = cli("generate", exported.path, *options)
    assert (code, output) == (1, "")
    assert "engine onnx-fp32 cannot be used on this machine: ONNX Runtime cannot load" in errors
    first, *others = errors.splitlines()
    # from the first second on, the user sees why it waits
    assert first == "checking engine onnx-fp32 on this machine before its first use ..."
    assert [line.partition(":")[0] for line in others] == ["error"]
    assert sorted(os.listdir(tmp_path)) == ["bundle", "cache"]


def test_the_graph_of_another_generator_is_refused(exported: Bundle, tmp_path: Path) -> None:
    other = random_bundle(tmp_path / "other", seed=3, num_classes=0)
    shutil.copytree(exported.path / "engines", other.path / "engines")
    with pytest.raises(BundleError, match="was built from other weights"):
        OnnxEngine(other, other.engines()[ONNX])
    edit_record(weights_sha256=other.weights_sha256)(other.engine_folder(ONNX))
    with pytest.raises(BundleError, match="which do not match generator 'tiny'"):
        OnnxEngine(other, other.engines()[ONNX])


def test_a_provider_that_is_not_in_use_is_refused(exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = exported_bundle.engines()[ONNX]
    with pytest.raises(RequestError, match="no provider 'GPU' runs on cpu; choose one of CPUExecutionProvider"):
        OnnxEngine(exported_bundle, stored, provider="GPU")
    with pytest.raises(RequestError, match="no provider 'CUDAExecutionProvider' runs on cpu"):
        OnnxEngine(exported_bundle, stored, provider="CUDAExecutionProvider")
    # ONNX Runtime itself falls back to the CPU; this machine's build, or the machine, has no such provider.
    monkeypatch.setitem(onnx_engine.PROVIDERS, "DmlExecutionProvider", "cpu")
    with pytest.raises(RequestError, match="could not load DmlExecutionProvider, and fell back to CPUExecutionProvider"):
        OnnxEngine(exported_bundle, stored, provider="DmlExecutionProvider")


def test_a_missing_runtime_names_the_extra(exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'uni-instruct\[serve\]'") as caught:
        OnnxEngine(exported_bundle, exported_bundle.engines()[ONNX])
    assert caught.value.exit_code == 2
