"""Benchmark all engines of a bundle in one run, beside torch eager and the machine's peak, and record which is the fastest."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from uni_instruct.bundle import Bundle
from uni_instruct.engine import (
    TORCH,
    Engine,
    EngineStatus,
    load_engine,
    record_speeds,
    refusal,
    resolve_engines,
    select_engine,
    statuses,
)
from uni_instruct.engines.benchmark.measure import Contender, Seconds, Spread, measure_interleaved, ratio, turns
from uni_instruct.engines.benchmark.peak import Convolutions, convolutions
from uni_instruct.engines.hardware.threads import usable_cpus
from uni_instruct.engines.runtime import RUNTIMES
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.noise import Inputs, draw_inputs
from uni_instruct.reference import REFERENCE_IMAGES
from uni_instruct.system.progress import ProgressFactory

EAGER = "eager fp32"


@dataclass(frozen=True, kw_only=True)
class BenchmarkPlan:
    """What to measure: for each engine and batch size, one figure per round, each from calls that take min_s seconds or more.

    engines: ids or runtimes; empty for all. spin: as in `open_engine`: True as in batch sampling, False as in a server.
    """

    bundle: Bundle
    batches: tuple[int, ...]
    engines: tuple[str, ...] = ()
    device: str | None = None
    rounds: int = 7
    min_s: float = 0.2
    spin: bool = True

    def __post_init__(self) -> None:
        if self.bundle.spec.steps > 1:
            raise RequestError(
                f"'{self.bundle.spec.name}' is a teacher of {self.bundle.spec.steps} steps, not a one-step generator",
                remedy="benchmark a one-step generator, such as digits",
                param="bundle",
            )
        if not math.isfinite(self.min_s):  # inf would measure forever, nan passes any bound
            raise RequestError(
                f"{self.min_s} is not a duration in seconds", remedy="give a number such as 0.2", param="seconds"
            )


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One engine at one batch size. images_per_s: median and quartiles over the rounds.

    streams: 0 if the engine decides, or has none. to_eager (speed relative to torch eager) and share_of_peak (FLOPs/s relative
    to the machine's peak) are medians of the ratios within each round; None if there is nothing to compare with.
    """

    engine: str
    streams: int
    device: str
    batch: int
    latency_ms: float
    images_per_s: Spread
    to_eager: float | None
    share_of_peak: float | None


@dataclass(frozen=True, kw_only=True)
class EngineComparison:
    """The result of a benchmark.

    peaks: the peak of each precision and device, by name. left_out: engine -> why it was not measured. chosen: the engine that
    `open_engine` now chooses, '' if the speeds were not recorded. remarks: sentences to print below the table.
    """

    rows: tuple[SpeedRow, ...]
    peaks: Mapping[str, Mapping[str, str | float]]
    left_out: Mapping[str, str]
    flops_per_image: float | None
    chosen: str
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An engine to be measured, and what its row of the table says of it."""

    name: str
    engine: str
    streams: int
    device: str
    precision: str
    images: Callable[[Inputs], object]


def compare(plan: BenchmarkPlan, progress: ProgressFactory) -> EngineComparison:
    """Run the benchmark, and record the speeds by which `open_engine` chooses. Engines that are not trusted here are left out.

    Raises RequestError for unknown engines or devices, EngineRefusedError if no engine is trusted, UniInstructError if one
    fails while it is measured.
    """
    found, entries, peaks = _prepare(plan, progress)
    contenders = [_contender(plan, entry) for entry in entries]
    contenders += [_peak_contender(name, peak) for name, peak in peaks.items()]
    steps = turns(contenders, plan.batches, plan.rounds)
    with progress("benchmark", steps, "figures") as bar:
        seconds = measure_interleaved(contenders, plan.batches, plan.rounds, plan.min_s, bar)
    flops = _flops(plan.bundle)
    rows = tuple(_row(entry, batch, seconds, peaks, flops) for batch in plan.batches for entry in entries)
    trusted = [status for status in found if status.state == "trusted"]
    chosen, remarks = _note(plan, trusted, rows)
    if not any(entry.name == EAGER for entry in entries):
        remarks.append("no comparison with torch eager: torch is not installed, or does not run on that device")
    if flops is None or not peaks:
        needs = "torch (to count the generator's FLOPs), and torch or OpenVINO (to measure the peak)"
        remarks.append(f"no share of the peak: it needs {needs}")
    return EngineComparison(
        rows=rows,
        peaks={name: _peak_facts(name, peak, plan, seconds) for name, peak in peaks.items()},
        left_out={str(status.engine_id): status.reason for status in found if status.state != "trusted"},
        flops_per_image=flops,
        chosen=chosen,
        remarks=tuple(remarks),
    )


def _prepare(
    plan: BenchmarkPlan, progress: ProgressFactory
) -> tuple[list[EngineStatus], list[_Entry], dict[str, Convolutions]]:
    """Try and open the engines and find the peaks, with progress bars: the statuses, what to measure, and the peaks by name."""
    wanted = resolve_engines(plan.bundle, plan.engines, plan.device)
    with progress("check engines", len(wanted), "engines") as bar:
        found = statuses(plan.bundle, wanted, plan.device, bar)
    trusted = [status for status in found if status.state == "trusted"]
    if not trusted:
        raise refusal(found)
    with progress("open engines", len(trusted) + 1, "engines") as bar:
        entries = _eager_entry(plan)
        bar.advance(1, EAGER)
        for status in trusted:
            entries += _entries(plan, status)
            bar.advance(1, str(status.engine_id))
    kinds = list(dict.fromkeys((entry.precision, entry.device) for entry in entries))
    peaks = {}
    with progress("find the peak", len(kinds), "precisions") as bar:
        for precision, device in kinds:
            if (peak := convolutions(precision, device)) is not None:
                peaks[_peak_name(precision, device)] = peak
            bar.advance(1, precision)
    return found, entries, peaks


def _entries(plan: BenchmarkPlan, status: EngineStatus) -> list[_Entry]:
    """The engine as `open_engine` opens it. If its runtime has streams, also with one stream, and with one stream per CPU."""
    engine_id = status.engine_id
    several = RUNTIMES[engine_id.runtime].has_streams and usable_cpus() > 1
    entries = []
    for streams in (None, 1, usable_cpus()) if several else (None,):
        stored = plan.bundle.engines().get(engine_id, engine_id)
        engine = load_engine(plan.bundle, stored, device=status.device, spin=plan.spin, streams=streams)
        name = f"{engine_id}, {streams} streams" if streams else str(engine_id)
        entries.append(
            _Entry(
                name=name,
                engine=str(engine_id),
                streams=streams or 0,
                device=status.device,
                precision=engine_id.precision,
                images=_caller(engine),
            )
        )
    return entries


def _caller(engine: Engine) -> Callable[[Inputs], object]:
    run = engine if engine.spec.makes_pictures else engine.outputs
    return lambda inputs: run(*inputs)


def _eager_entry(plan: BenchmarkPlan) -> list[_Entry]:
    try:
        device = RUNTIMES[TORCH.runtime].device_for(TORCH, plan.device)
    except UniInstructError:
        return []
    from uni_instruct.networks.eager import eager

    images = eager(plan.bundle, device)
    return [_Entry(name=EAGER, engine=EAGER, streams=0, device=device, precision="fp32", images=images)]


def _contender(plan: BenchmarkPlan, entry: _Entry) -> Contender:
    spec = plan.bundle.spec

    def prepare(batch: int) -> Callable[[], object]:
        inputs = draw_inputs(spec, range(batch), resolve_class_ids(spec, range(batch)))

        def call() -> object:
            try:
                return entry.images(inputs)
            except Exception as error:  # the runtimes' errors have no narrower common class
                problem = " ".join(str(error).split())[:200]
                raise UniInstructError(
                    f"{entry.name} failed at batch {batch}: {type(error).__name__}: {problem}",
                    remedy="leave that batch out of --batches, or name the other engines with --engine",
                ) from error

        return call

    return Contender(name=entry.name, prepare=prepare)


def _peak_contender(name: str, peak: Convolutions) -> Contender:
    """The peak as a contender. It is measured again beside every batch size, so that each share refers to the same moment."""
    return Contender(name=name, prepare=lambda batch: peak.call)


def _row(entry: _Entry, batch: int, seconds: Seconds, peaks: Mapping[str, Convolutions], flops: float | None) -> SpeedRow:
    own, base = seconds[entry.name, batch], seconds.get((EAGER, batch))
    share, name = None, _peak_name(entry.precision, entry.device)
    if flops is not None and name in peaks:
        # share = (FLOPs of the batch / its seconds) / (FLOPs of the peak's convolutions / their seconds)
        share = batch * flops / peaks[name].flops * ratio(seconds[name, batch], own)
    speed = Spread.of([batch / time_s for time_s in own])
    return SpeedRow(
        engine=entry.engine,
        streams=entry.streams,
        device=entry.device,
        batch=batch,
        latency_ms=1e3 * batch / speed.median,
        images_per_s=speed,
        to_eager=ratio(base, own) if base else None,
        share_of_peak=share,
    )


def _note(plan: BenchmarkPlan, trusted: Sequence[EngineStatus], rows: Sequence[SpeedRow]) -> tuple[str, list[str]]:
    """Record the speeds. Returns the engine that `open_engine` then chooses ('' if nothing was recorded), and remarks on it."""
    if plan.engines:
        return "", ["only some engines were measured, so the default engine does not change"]
    # An engine is chosen before its batch sizes are known. So use the batch size of trials, or the measured one nearest to it.
    batch = min(plan.batches, key=lambda size: (abs(size - REFERENCE_IMAGES), size))
    medians = {row.engine: row.images_per_s.median for row in rows if row.batch == batch and not row.streams}
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    speeds = {status: medians[str(status.engine_id)] for status in trusted}
    if not record_speeds(plan.bundle, speeds, stamp):
        return "", ["the user's cache cannot be written, so the default engine does not change"]
    chosen = str(select_engine(plan.bundle, None, plan.device).engine_id)
    return chosen, [f"the default engine is now {chosen}, the fastest on this machine at batch {batch}"]


def _peak_name(precision: str, device: str) -> str:
    return f"3x3 convolutions {precision} on {device}"


def _peak_facts(name: str, peak: Convolutions, plan: BenchmarkPlan, seconds: Seconds) -> dict[str, str | float]:
    rates = Spread.of([peak.flops / time_s / 1e9 for batch in plan.batches for time_s in seconds[name, batch]])
    return {"by": peak.by, "gflops_per_s": rates.median, "gflops_per_s_low": rates.low, "gflops_per_s_high": rates.high}


def _flops(bundle: Bundle) -> float | None:
    if not RUNTIMES[TORCH.runtime].is_installed():
        return None
    from uni_instruct.networks.flops import flops_of_image

    return float(flops_of_image(bundle.spec))
