"""Turns, medians and quartiles; the peak's own arithmetic."""

from collections.abc import Callable

import numpy as np
import pytest

from uni_instruct.engines.benchmark import measure, peak
from uni_instruct.engines.benchmark.measure import Contender, Spread, measure_interleaved, median_seconds, ratio, turns
from uni_instruct.system.progress import silent


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def taking(self, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_contenders_take_turns_forwards_and_backwards_after_one_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), list[tuple[str, int]]()

    def contender(name: str, second: float) -> Contender:
        def prepare(batch: int) -> Callable[[], None]:
            def call() -> None:
                order.append((name, batch))
                clock.now += second * batch

            return call

        return Contender(name=name, prepare=prepare)

    contenders, steps = [contender("a", 1.0), contender("b", 2.0)], []
    with silent("", 0, "") as bar:
        bar.advance = lambda amount, note=None: steps.append(amount)  # type: ignore[method-assign]
        found = measure_interleaved(contenders, (1, 4), 2, 0.5, bar)
    once = [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    assert order == once + once + once[::-1]
    assert sum(steps) == turns(contenders, (1, 4), 2) == 12
    assert found == {("a", 1): [1.0] * 2, ("b", 1): [2.0] * 2, ("a", 4): [4.0] * 2, ("b", 4): [8.0] * 2}


def test_a_short_call_is_repeated_after_one_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert median_seconds(clock.taking(0.4, 0.1, 0.3, 0.2, 9.0), min_s=0.5) == pytest.approx(0.2)
    assert clock.now == pytest.approx(1.0)  # 0.4 is not counted, 0.1 + 0.3 + 0.2 reach half a second


def test_a_long_call_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert median_seconds(clock.taking(3.0, 9.0), min_s=0.5) == 3.0
    assert clock.now == 3.0


def test_a_round_that_other_work_slowed_down_does_not_change_a_ratio() -> None:
    own, base = [1.0, 10.0, 1.1], [3.0, 30.0, 3.3]
    assert ratio(base, own) == pytest.approx(3.0)
    spread = Spread.of(own)
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.05, 1.1, 5.55))
    assert Spread.of([2.0]) == Spread(median=2.0, low=2.0, high=2.0)


@pytest.mark.parametrize("name", sorted(peak._MAKERS))
def test_the_peak_is_of_the_convolutions_that_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs as torch counts them; and OpenVINO's chain computes what torch's does."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(peak, "_MAKERS", {name: peak._MAKERS[name]})
    found = peak.convolutions("fp32", "cpu")
    if found is None:
        pytest.skip(f"{name} is not installed")
    x = torch.randn(peak.PEAK_IMAGES["cpu"], peak.CHANNELS, peak.SIZE, peak.SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = x
        for _ in range(peak.LAYERS):
            y = torch.nn.functional.conv2d(y, torch.from_numpy(peak._weights()), padding=1)
    assert found.flops == counter.get_total_flops()
    assert 0.3 < float(y.std() / x.std()) < 1.2  # values stay of one size: nothing overflows or becomes denormal
    assert found.by.startswith(name)
    assert found.precision == "fp32"
    found.call()


def test_no_peak_where_nothing_has_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "_MAKERS", {"openvino": peak._MAKERS["openvino"]})
    assert peak.convolutions("fp16", "cpu") is None
    assert peak.convolutions("int8", "cuda:0") is None


def test_the_peaks_weights_keep_the_variance() -> None:
    weights = peak._weights()
    assert float(np.square(weights).sum(axis=(1, 2, 3)).mean()) == pytest.approx(1.0, rel=0.05)
