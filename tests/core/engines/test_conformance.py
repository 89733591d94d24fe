"""Every engine that this machine can build keeps one contract: what goes in, what comes out, from any thread, till closed."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, EngineId, open_engine
from uni_instruct.engines.cuda import gpus
from uni_instruct.engines.outputs import TOLERANCES, Outputs, agreement
from uni_instruct.errors import ParityError, RequestError
from uni_instruct.export.targets import TARGETS, Target, export_engine
from uni_instruct.noise import class_ids_in_turn, noise

BATCHES = (1, 2, 3, 7, 33, 64)
# Of engines that are built for one kind of GPU, those for the GPUs that are here.
HERE = [
    target
    for row in TARGETS.values()
    for target in ([row.for_gpu(gpu.sm) for gpu in gpus() if gpu.sm in row.sms] if row.sms else [row])
]
ENGINES = [*(str(target.engine_id) for target in HERE), "torch-fp32", "torch-bf16"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with every engine that can be built here, and agrees: less than 32 bits may not, on some processors."""
    made = random_bundle(tmp_path_factory.mktemp("conformance") / "bundle", seed=3, image_shape=(3, 16, 12))
    for target in HERE:
        with suppress(ParityError) if target.engine_id.precision != "fp32" else nullcontext():
            if is_possible(target):
                export_engine(made, str(target.engine_id))
    return Bundle.open(made.path)


def is_possible(target: Target) -> bool:
    try:
        target.check_machine()
    except RequestError:  # a precision that this processor does not have; a missing package is an error
        return False
    return True


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Engine:
    engine_id = EngineId.parse(request.param)
    if engine_id.runtime != "torch" and engine_id not in bundle.engines():
        pytest.skip(f"{engine_id} is refused on this machine")
    return open_engine(bundle, engine_id)


@pytest.fixture(scope="module")
def truth(bundle: Bundle) -> Outputs:
    return open_engine(bundle, "torch-fp32").outputs(*inputs(bundle, 64))


def inputs(bundle: Bundle, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    return noise(range(count), bundle.spec.noise_shape), class_ids_in_turn(bundle.spec, count)


def test_says_what_it_is(engine: Engine, bundle: Bundle) -> None:
    assert engine.spec == bundle.spec
    assert str(engine.id) in ENGINES
    assert engine.device == "cpu" or engine.device.startswith("cuda:")


@pytest.mark.parametrize("batch", BATCHES)
def test_gives_images_of_any_batch_within_its_tolerance(batch: int, engine: Engine, bundle: Bundle, truth: Outputs) -> None:
    found = engine.outputs(*inputs(bundle, batch))
    assert (found.pixels.shape, found.pixels.dtype) == ((batch, 16, 12, 3), np.uint8)
    assert (found.images.shape, found.images.dtype) == ((batch, 3, 16, 12), np.float32)
    assert not agreement([found], truth.images).problem(TOLERANCES[engine.id.precision])
    np.testing.assert_array_equal(engine(*inputs(bundle, batch)), found.pixels)


def test_the_class_is_heeded(engine: Engine, bundle: Bundle) -> None:
    z, class_ids = inputs(bundle, 10)
    assert class_ids is not None
    assert (engine(z, class_ids) != engine(z, (class_ids + 1) % 10)).any(axis=(1, 2, 3)).all()


def test_one_image_is_the_same_alone_and_among_others(engine: Engine, bundle: Bundle) -> None:
    """To the byte, but for torch and on GPUs, whose kernels sum in another order for another batch."""
    z, class_ids = inputs(bundle, 40)
    assert class_ids is not None
    together = engine(z, class_ids).astype(int)
    alone = np.concatenate([engine(z[i : i + 1], class_ids[i : i + 1]) for i in range(40)])
    exact = engine.id.runtime != "torch" and engine.device == "cpu"
    assert np.abs(together - alone).max() <= (0 if exact else TOLERANCES[engine.id.precision].pixel_difference)


def test_what_it_returns_and_what_it_is_given_are_the_callers_own(engine: Engine, bundle: Bundle) -> None:
    z, class_ids = inputs(bundle, 8)
    given = z.copy()
    first = engine.outputs(z, class_ids)
    kept = (first.pixels.copy(), first.images.copy())
    engine.outputs(*inputs(bundle, 7))
    np.testing.assert_array_equal(first.pixels, kept[0])
    np.testing.assert_array_equal(first.images, kept[1])
    np.testing.assert_array_equal(z, given)
    first.pixels[...] = 0
    first.images[...] = 0


def test_many_threads_get_what_one_gets(engine: Engine, bundle: Bundle) -> None:
    calls = [inputs(bundle, count) for count in (1, 5, 16, 33) * 6]
    expected = [engine(*call) for call in calls]
    with ThreadPoolExecutor(6) as pool:
        for found, wanted in zip(pool.map(lambda call: engine(*call), calls), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, ids: (z[:0], ids[:0]), "B >= 1"),
        (lambda z, ids: (z[:, :1], ids), "not \\[B, 3, 16, 12\\]"),
        (lambda z, ids: (z.astype(np.float64), ids), "not float32"),
        (lambda z, ids: (z, ids[:-1]), "class ids"),
        (lambda z, ids: (z, ids + 7), "outside 0..9"),
        (lambda z, ids: (z, -ids), "outside 0..9"),
        (lambda z, ids: (z, None), "no class ids"),
    ],
    ids=["batch 0", "shape", "float64", "too few classes", "class too large", "class negative", "no classes"],
)
def test_wrong_input_is_refused_alike(change: object, message: str, engine: Engine, bundle: Bundle) -> None:
    assert callable(change)
    with pytest.raises(RequestError, match=message):
        engine(*change(*inputs(bundle, 8)))


def test_exported_engines_need_no_torch(engine: Engine, bundle: Bundle, tmp_path: Path) -> None:
    if engine.id.runtime == "torch":
        pytest.skip("torch's own engine")
    script = """
import sys
for name in ("torch", "onnx", "onnxscript"):
    sys.modules[name] = None
import numpy as np
from uni_instruct.engine import open_engine
from uni_instruct.noise import class_ids_in_turn, noise
engine = open_engine(sys.argv[1], sys.argv[2])
np.save(sys.argv[3], engine(noise(range(33), engine.spec.noise_shape), class_ids_in_turn(engine.spec, 33)))
"""
    command = [sys.executable, "-c", script, str(bundle.path), str(engine.id), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), engine(*inputs(bundle, 33)))


def test_closes(engine: Engine, bundle: Bundle) -> None:
    engine(*inputs(bundle, 33))
    engine.close()
    with pytest.raises(AssertionError, match="the engine was closed"):
        engine(*inputs(bundle, 1))
