"""The batcher's truths, on a real engine behind a gate that the test opens."""

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders.growth import without_collector
from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.engine import Engine, open_engine
from uni_instruct.generate import generate_images, mix_classes, resolve_class_ids
from uni_instruct.noise import Between, noise
from uni_instruct.serve.batching import batch_sizes
from uni_instruct.serve.batching import batcher as batcher_module
from uni_instruct.serve.batching.batch_sizes import prewarm
from uni_instruct.serve.batching.batcher import Batcher
from uni_instruct.serve.batching.device_thread import DeviceThread
from uni_instruct.serve.errors import EngineFailedError, NotReadyError, QueueFullError, TimedOutError
from uni_instruct.serve.metrics import ServerMetrics

FOREVER_S = 60.0
POISON = 666


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> Engine:
    return open_engine(tiny_bundle, "torch")


@pytest.fixture(scope="module")
def digits() -> Engine:
    """One whose images are the same in every batch, to the byte."""
    return open_engine("digits", "onnx")


class Gate:
    """An engine that waits for the test before each call, remembers its batches, and fails on the poisoned seed."""

    def __init__(self, engine: Engine, is_open: bool = False):
        self.spec, self.id, self.device = engine.spec, engine.id, engine.device
        self.mixes_classes = engine.mixes_classes
        self.classes: list[ClassIds | None] = []
        self.batches: list[np.ndarray] = []
        self._engine = engine
        self._open = threading.Semaphore(10**6 if is_open else 0)
        self._poison = noise([POISON], engine.spec.noise_shape)[0]

    def let(self, calls: int) -> None:
        self._open.release(calls)

    def saw(self, seed: int) -> bool:
        z = noise([seed], self.spec.noise_shape)[0]
        return any((row == z).all() for batch in self.batches for row in batch)

    def __call__(self, z: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
        self.batches.append(z)
        self.classes.append(class_ids)
        self._open.acquire()
        if any((row == self._poison).all() for row in z):
            raise RuntimeError("poisoned")
        return self._engine(z, class_ids)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, FOREVER_S))


def make(gate: Gate, largest: int = 4, queue_images: int = 64) -> Batcher:
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= largest]
    return Batcher(gate, sizes, queue_images, ServerMetrics().of_model("tiny"), DeviceThread())


def ask(batcher: Batcher, gate: Gate, seeds: list[int], timeout_s: float = FOREVER_S) -> "asyncio.Task[Any]":
    return asyncio.create_task(batcher.submit(seeds, resolve_class_ids(gate.spec, seeds), timeout_s))


async def until(true: Any) -> None:
    while not true():
        await asyncio.sleep(0.001)


def expected(engine: Engine, seeds: list[int]) -> np.ndarray:
    return generate_images(engine, seeds, resolve_class_ids(engine.spec, seeds), batch=1)


def assert_same_images(images: np.ndarray, truth: np.ndarray) -> None:
    """Equal but for the last rounding, which torch may do differently in another batch."""
    assert np.abs(images.astype(int) - truth).max() <= 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9), min_size=1, max_size=6))
def test_an_image_does_not_depend_on_its_batch_mates(engine: Engine, requests: list[list[int]]) -> None:
    async def work() -> None:
        gate = Gate(engine, is_open=True)
        batcher = make(gate, queue_images=64)
        tasks = [ask(batcher, gate, seeds) for seeds in requests]
        for seeds, task in zip(requests, tasks, strict=True):
            assert_same_images((await task).images, expected(engine, seeds))
        await batcher.close()

    run(work())


def test_mixtures_of_classes_and_whole_ones_share_a_batch(digits: Engine) -> None:
    """The whole ones' bytes stay; and where nothing is mixed, the engine hears nothing of mixtures."""
    mixture = mix_classes(digits.spec, [1, 2], [3, 8], [0.3, 0.5])
    truth = digits(noise([50, 51], digits.spec.noise_shape), mixture)

    async def work() -> None:
        gate = Gate(digits)
        batcher = make(gate)
        first = ask(batcher, gate, [1])
        await until(lambda: len(gate.batches) == 1)
        mixed = asyncio.create_task(batcher.submit([50, 51], mixture, FOREVER_S))
        whole = ask(batcher, gate, [2])
        await asyncio.sleep(0)
        gate.let(2)
        for task, images in ((first, expected(digits, [1])), (mixed, truth), (whole, expected(digits, [2]))):
            np.testing.assert_array_equal((await task).images, images)
        gate.let(1)
        np.testing.assert_array_equal((await ask(batcher, gate, [3])).images, expected(digits, [3]))
        assert [len(batch) for batch in gate.batches] == [1, 4, 1]
        assert [isinstance(classes, ClassMixture) for classes in gate.classes] == [False, True, False]
        await batcher.close()

    run(work())


def test_an_idle_engine_starts_at_once_and_a_busy_one_gathers(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate)
        first = ask(batcher, gate, [1])
        await until(lambda: len(gate.batches) == 1)
        rest = [ask(batcher, gate, [seed]) for seed in (2, 3, 4)]
        await asyncio.sleep(0)
        gate.let(2)
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in gate.batches] == [1, 4]  # three items, padded to a prewarmed size
        await batcher.close()

    run(work())


def test_the_engine_takes_its_next_batch_while_the_event_loop_is_busy(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate)
        first = ask(batcher, gate, [1])
        await until(lambda: len(gate.batches) == 1)
        second = ask(batcher, gate, [2])
        await asyncio.sleep(0)
        gate.let(2)
        while len(gate.batches) < 2:  # no await: nothing else runs on the loop
            time.sleep(0.001)
        for task, seed in ((first, 1), (second, 2)):
            assert_same_images((await task).images, expected(engine, [seed]))
        await batcher.close()

    run(work())


@pytest.mark.parametrize(
    ("seconds", "batches"),
    [
        pytest.param(lambda images: images, [8, 4, 2, 1], id="by-the-image"),  # a CPU: padding costs what an image does
        pytest.param(lambda images: 1, [16], id="by-the-call"),  # a GPU: 16 images take as long as 8
        pytest.param(lambda images: 8 + images, [16], id="between"),
    ],
)
def test_a_batch_is_padded_where_that_makes_more_images_a_second(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], batches: list[int]
) -> None:
    clock = SimpleNamespace(now=0.0)

    class Timed(Gate):
        def __call__(self, z: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
            images = super().__call__(z, class_ids)
            clock.now += seconds(len(z))
            return images

    async def work() -> None:
        gate = Timed(engine, is_open=True)
        batcher = make(gate, largest=16)
        for size in (1, 2, 4, 8, 16):  # from which it learns what they take
            await ask(batcher, gate, list(range(size)))
        del gate.batches[:]
        assert_same_images((await ask(batcher, gate, list(range(15)))).images, expected(engine, list(range(15))))
        assert [len(batch) for batch in gate.batches] == batches
        await batcher.close()

    monkeypatch.setattr(batcher_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    run(work())


def test_a_request_of_64_cannot_starve_one_of_1(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate, queue_images=128)
        large = ask(batcher, gate, list(range(64)))
        await until(lambda: gate.batches)
        small = ask(batcher, gate, [100])
        await asyncio.sleep(0)
        gate.let(2)
        assert_same_images((await small).images, expected(engine, [100]))
        assert not large.done()
        assert len(gate.batches) <= 3
        gate.let(64)
        assert_same_images((await large).images, expected(engine, list(range(64))))
        await batcher.close()

    run(work())


def test_requests_take_turns(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate)
        blocker = ask(batcher, gate, [0])
        await until(lambda: gate.batches)
        pair = [ask(batcher, gate, list(range(start, start + 8))) for start in (10, 20)]
        await asyncio.sleep(0)
        gate.let(1)
        await until(lambda: len(gate.batches) == 2)
        turns = noise([10, 20, 11, 21], gate.spec.noise_shape)
        np.testing.assert_array_equal(gate.batches[1], turns)
        gate.let(16)
        await asyncio.gather(blocker, *pair)
        await batcher.close()

    run(work())


def test_the_queue_is_bounded_in_images(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate, queue_images=8)
        running = ask(batcher, gate, [1])
        await until(lambda: gate.batches)
        waiting = ask(batcher, gate, list(range(10, 16)))
        await asyncio.sleep(0)
        with pytest.raises(
            QueueFullError, match="no room for this request: 6 of at most 8 images are waiting; try again in"
        ) as refused:
            await ask(batcher, gate, [20, 21, 22])
        assert refused.value.retry_after_s >= 1
        fits = ask(batcher, gate, [20, 21])
        gate.let(10)
        await asyncio.gather(running, waiting, fits)
        assert not gate.saw(22)
        await ask(batcher, gate, list(range(30, 38)))  # there is room again
        await batcher.close()

    run(work())


def test_what_was_cancelled_or_expired_never_runs(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate, queue_images=8)
        running = ask(batcher, gate, [1])
        await until(lambda: gate.batches)
        left, expired = ask(batcher, gate, [2, 3, 4]), ask(batcher, gate, [5, 6], timeout_s=0.01)
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(TimedOutError, match="2 images were not made within"):
            await expired
        full = ask(batcher, gate, list(range(10, 18)))  # they no longer take up room
        gate.let(10)
        await asyncio.gather(running, full)
        assert left.cancelled()
        assert not any(map(gate.saw, (2, 3, 4, 5, 6)))
        await batcher.close()

    run(work())


def test_an_error_does_not_outlive_its_answer(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate)
        first = ask(batcher, gate, [1])
        await until(lambda: gate.batches)
        with without_collector():
            try:
                await batcher.submit([2], resolve_class_ids(gate.spec, [2]), timeout_s=0.01)
            except TimedOutError as error:
                expired = weakref.ref(error)
            await asyncio.sleep(0)  # the loop itself holds what it has just handed over
            assert expired() is None
        gate.let(1)
        await first
        await batcher.close()

    run(work())


def test_a_bad_item_fails_alone(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        gate = Gate(engine, is_open=True)
        batcher = make(gate, largest=16)
        good = [ask(batcher, gate, seeds) for seeds in ([1], [2, 3], [4])]
        bad = ask(batcher, gate, [5, POISON, 7])
        for seeds, task in zip(([1], [2, 3], [4]), good, strict=True):
            assert_same_images((await task).images, expected(engine, seeds))
        with pytest.raises(EngineFailedError, match="failed on seed 666: poisoned"):
            await bad
        assert_same_images((await ask(batcher, gate, [5])).images, expected(engine, [5]))
        await batcher.close()

    with caplog.at_level(logging.CRITICAL):
        run(work())


def test_an_image_between_seeds_that_fails_is_named_in_words(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Gate):
        def __call__(self, z: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
            raise RuntimeError("poisoned")

    async def work() -> None:
        gate = Failing(engine, is_open=True)
        batcher = make(gate)
        with pytest.raises(EngineFailedError) as failed:
            await batcher.submit([Between(3, 58, 0.5)], resolve_class_ids(gate.spec, [3]), FOREVER_S)
        assert failed.value.problem == "the engine failed between seeds 3 and 58, at 0.500: poisoned"
        await batcher.close()

    run(work())
    assert [record.getMessage() for record in caplog.records] == ["the engine failed between seeds 3 and 58, at 0.500"]


def test_an_engine_that_answers_another_shape_is_an_error(engine: Engine) -> None:
    class Cropping(Gate):
        def __call__(self, z: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
            return super().__call__(z, class_ids)[:, :4]

    async def work() -> None:
        gate = Cropping(engine, is_open=True)
        batcher = make(gate)
        with pytest.raises(EngineFailedError, match=r"\(1, 4, 8, 1\) instead of uint8 \(1, 8, 8, 1\)"):
            await ask(batcher, gate, [1])
        await batcher.close()

    run(work())


def test_closing_answers_what_runs_and_refuses_what_waits(engine: Engine) -> None:
    async def work() -> None:
        gate = Gate(engine)
        batcher = make(gate)
        running = ask(batcher, gate, [1])
        await until(lambda: gate.batches)
        waiting = ask(batcher, gate, [2])
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        gate.let(1)
        assert_same_images((await running).images, expected(engine, [1]))
        for task in (waiting, ask(batcher, gate, [3])):
            with pytest.raises(NotReadyError, match="stopping"):
                await task
        await closing

    run(work())


def test_calls_that_are_known_to_be_quick_run_on_the_event_loop(engine: Engine) -> None:
    class Noting(Gate):
        def __call__(self, z: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
            threads.append(threading.current_thread() is threading.main_thread())
            return super().__call__(z, class_ids)

    threads: list[bool] = []

    async def work() -> None:
        gate = Noting(engine, is_open=True)
        device = DeviceThread(quick_s=FOREVER_S)
        batcher = Batcher(gate, (1, 2, 4), 64, ServerMetrics().of_model("tiny"), device)
        for seeds in ([1], [2, 3, 4, 5, 6], [POISON]):
            if seeds == [POISON]:
                with pytest.raises(EngineFailedError, match="failed on seed 666: poisoned"):
                    await ask(batcher, gate, seeds)
            else:
                assert_same_images((await ask(batcher, gate, seeds)).images, expected(engine, seeds))
        assert_same_images((await ask(batcher, gate, [7])).images, expected(engine, [7]))
        await batcher.close()
        device.close()

    run(work())
    # The first one in the thread: how long it takes is not known before.
    assert threads == [False, True, True, True, True]


def test_batches_grow_as_long_as_they_stay_short(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    class Slow(Gate):
        def __call__(self, z: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
            clock.now += 0.1 * len(z)
            return super().__call__(z, class_ids)

    monkeypatch.setattr(batch_sizes, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert prewarm(Slow(engine, is_open=True), max_batch=64, max_batch_s=0.5) == (1, 2, 4)
    assert prewarm(Slow(engine, is_open=True), max_batch=64, max_batch_s=0.05) == (1,)
    assert prewarm(Gate(engine, is_open=True), max_batch=8, max_batch_s=0.5) == (1, 2, 4, 8)


def test_a_gpu_has_run_a_mixture_before_one_is_asked_for(engine: Engine) -> None:
    """There torch captures a graph of its own for them."""
    for device, mixed in (("cpu", []), ("cuda:0", [1, 2, 4])):
        gate = Gate(engine, is_open=True)
        gate.device = device
        prewarm(gate, max_batch=4, max_batch_s=60)
        assert [len(classes) for classes in gate.classes if isinstance(classes, ClassMixture)] == mixed
