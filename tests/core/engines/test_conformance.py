"""Every engine that this machine can build keeps one contract: what goes in, what comes out, from any thread, till closed."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassMixture
from uni_instruct.engine import Engine, EngineId, open_engine
from uni_instruct.engines.hardware.cuda import gpus
from uni_instruct.engines.outputs import TOLERANCES, Outputs, agreement
from uni_instruct.errors import EngineRefusedError, ParityError, RequestError
from uni_instruct.export.targets import TARGETS, export_engine
from uni_instruct.networks.reference import make_reference
from uni_instruct.noise import noise, round_robin_class_ids

BATCHES = (1, 2, 3, 7, 33, 64)
# Of engines that are built for one kind of GPU, those for the GPUs that are here.
HERE = [
    target
    for row in TARGETS.values()
    for target in ([row.for_gpu(gpu.sm) for gpu in gpus() if gpu.sm in row.sms] if row.sms else [row])
]
BUILT = {str(target.engine_id): target for target in HERE}
ENGINES = [*BUILT, "torch-fp32", "torch-bf16", "torch-fp32-compiled", "torch-bf16-compiled"]
# Not in the default run: NNCF takes half a minute, finding the layers that keep float32 ten seconds, compiling half a minute,
# and what is for GPUs runs on them there.
SLOW = {"onnx-fp16", "openvino-int8", "openvino-bf16", "torch-fp32-compiled", "torch-bf16-compiled"}


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Bundles whose engines are built when a test first asks for them: a colour network of an odd shape, with random weights.

    int8 keeps its tolerance on trained weights alone, where large activations are rare; its bundle has those of the digits.
    """
    folder = tmp_path_factory.mktemp("conformance")

    @cache
    def make(trained: bool) -> Bundle:
        if not trained:
            return random_bundle(folder / "random", seed=3, image_shape=(3, 16, 12))
        shipped = Bundle.open("digits")
        return Bundle.write(folder / "digits", shipped.spec, shipped.weights(), "test", reference=make_reference)

    return lambda engine: make(engine.endswith("int8"))


@pytest.fixture(scope="module")
def refusal(bundle_of: Callable[[str], Bundle]) -> Callable[[str], str]:
    """Builds an engine, once; what stands against it here: less than 32 bits may not agree, on some processors."""

    @cache
    def build(engine: str) -> str:
        target = BUILT.get(engine)
        try:
            if target is not None:
                target.check_machine()
                export_engine(bundle_of(engine), engine)
        except RequestError as error:  # a precision that this processor does not have; a missing package is an error
            return error.problem
        except ParityError as error:
            if EngineId.parse(engine).precision == "fp32":
                raise
            return error.problem
        return ""

    return build


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ENGINES])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bundle(name: str, bundle_of: Callable[[str], Bundle]) -> Bundle:
    return bundle_of(name)


@pytest.fixture
def engine(name: str, bundle: Bundle, refusal: Callable[[str], str]) -> Engine:
    if problem := refusal(name):
        pytest.skip(f"{name} cannot be had on this machine: {problem}")
    try:
        return open_engine(bundle, name)
    except EngineRefusedError as error:  # less than 32 bits may pass one check barely, and not the next
        if EngineId.parse(name).precision == "fp32":
            raise
        pytest.skip(f"{name} cannot be had on this machine: {error.problem}")


@cache
def truth(bundle: Bundle) -> Outputs:
    return open_engine(bundle, "torch-fp32").outputs(*inputs(bundle, 64))


def inputs(bundle: Bundle, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    return noise(range(count), bundle.spec.noise_shape), round_robin_class_ids(bundle.spec, count)


def test_says_what_it_is(engine: Engine, bundle: Bundle) -> None:
    assert engine.spec == bundle.spec
    assert str(engine.id) in ENGINES
    assert engine.device == "cpu" or engine.device.startswith("cuda:")


@pytest.mark.parametrize("batch", BATCHES)
def test_gives_images_of_any_batch_within_its_tolerance(batch: int, engine: Engine, bundle: Bundle) -> None:
    found = engine.outputs(*inputs(bundle, batch))
    channels, height, width = bundle.spec.image_shape
    assert (found.pixels.shape, found.pixels.dtype) == ((batch, height, width, channels), np.uint8)
    assert (found.images.shape, found.images.dtype) == ((batch, channels, height, width), np.float32)
    assert not agreement([found], truth(bundle).images).problem(TOLERANCES[engine.id.precision])
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


@pytest.mark.parametrize("batch", [1, 7, 33])
def test_the_ends_of_a_mixture_are_its_classes_to_the_byte(batch: int, engine: Engine, bundle: Bundle) -> None:
    z, class_ids = inputs(bundle, batch)
    assert class_ids is not None
    assert engine.mixes_classes
    others = (class_ids + 3) % 10
    for share, whole in ((np.zeros(batch, np.float32), class_ids), (np.ones(batch, np.float32), others)):
        found, expected = engine.outputs(z, ClassMixture(class_ids, others, share)), engine.outputs(z, whole)
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_array_equal(engine(z, ClassMixture(class_ids, others, np.ones(batch, np.float32))), engine(z, others))


def test_mixtures_are_torchs_and_lie_between(engine: Engine, bundle: Bundle) -> None:
    """Shares of all sizes beside images that are not mixed, whose bytes stay what they are alone."""
    z, class_ids = inputs(bundle, 40)
    assert class_ids is not None
    share = np.linspace(0, 1, 40, dtype=np.float32)
    share[::4] = 0
    mixture = ClassMixture(class_ids, (class_ids + 1) % 10, share)
    found, expected = engine.outputs(z, mixture), open_engine(bundle, "torch-fp32").outputs(z, mixture)
    assert not agreement([found], expected.images).problem(TOLERANCES[engine.id.precision])
    plain = engine.outputs(z, class_ids)
    np.testing.assert_array_equal(found.images[::4], plain.images[::4])
    mixed = (share > 0.2) & (share < 0.8)
    for ends in (plain.images, engine.outputs(z, mixture.other_ids).images):
        assert (found.images != ends)[mixed].any(axis=(1, 2, 3)).all()


def test_a_mixture_of_lists_and_views_is_that_of_arrays(engine: Engine, bundle: Bundle) -> None:
    z, _ = inputs(bundle, 5)
    expected = engine(z, ClassMixture(np.full(5, 2), np.full(5, 7), np.full(5, 0.25, np.float32)))
    views = ClassMixture(*(np.broadcast_to(np.array(value), 5) for value in (2, 7, 0.25)))
    lists: Any = ([2] * 5, [7] * 5, [0.25] * 5)
    np.testing.assert_array_equal(engine(z, views), expected)
    np.testing.assert_array_equal(engine(z, ClassMixture(*lists)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, share: (ids, ids, share + 0.6), "share 1.1 is outside 0..1; give 0 for the first class"),
        (lambda ids, share: (ids, ids, share - 0.6), "share -0.1 is outside 0..1"),
        (lambda ids, share: (ids, ids, share * np.nan), "share nan is outside 0..1"),
        (lambda ids, share: (ids, ids, share[:-1]), r"shares are float32 \[7\], not numbers \[8\]; give one for each"),
        (lambda ids, share: (ids, ids, share[0]), r"shares are float32 \[\], not numbers \[8\]"),
        (lambda ids, share: (ids, ids, share > 1), r"shares are bool \[8\], not numbers"),
        (lambda ids, share: (ids, ids + 7, share), "class 10 is outside 0..9"),
        (lambda ids, share: (ids - 1, ids, share), "class -1 is outside 0..9"),
        (lambda ids, share: (ids, ids[:-1], share), r"class ids are int64 \[7\], not integers \[8\]"),
        (lambda ids, share: (ids, ids * 0.5, share), "class ids are float64"),
    ],
)
def test_a_wrong_mixture_is_refused_alike(change: object, message: str, engine: Engine, bundle: Bundle) -> None:
    assert callable(change)
    z, class_ids = inputs(bundle, 8)
    with pytest.raises(RequestError, match=message):
        engine(z, ClassMixture(*change(class_ids, np.full(8, 0.5, np.float32))))


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
        (lambda z, ids: (z[:, :, :-1], ids), "not \\[B, (3, 16, 12|1, 8, 8)\\]"),
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
from uni_instruct.noise import round_robin_class_ids, noise
engine = open_engine(sys.argv[1], sys.argv[2])
np.save(sys.argv[3], engine(noise(range(33), engine.spec.noise_shape), round_robin_class_ids(engine.spec, 33)))
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
