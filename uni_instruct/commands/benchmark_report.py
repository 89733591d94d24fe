"""The output of `uni-instruct benchmark`: a table, and a plot of images a second over the batch size."""

from pathlib import Path
from typing import TypedDict

from uni_instruct.engines.benchmark.comparison import EAGER, EngineComparison, SpeedRow
from uni_instruct.engines.hardware.machine import MachineFacts
from uni_instruct.errors import MissingExtraError, RequestError
from uni_instruct.system.files import atomic_file

WIDTH = 120  # of the table if the output is not a terminal


class ThreadFacts(TypedDict):
    """The number of threads, and the policy of --threads: 'alone' or 'shared'."""

    count: int
    policy: str


class LoadFacts(TypedDict):
    """The machine's load average before and after the measurement."""

    before: float
    after: float


class BenchmarkFacts(TypedDict):
    """What was measured, on which machine and with which versions. The figures themselves are an `EngineComparison`."""

    command: str
    generator: str
    image_shape: tuple[int, int, int]
    weights_sha256: str
    rounds: int
    seconds_per_figure: float
    threads: ThreadFacts
    load_average: LoadFacts
    machine: MachineFacts
    versions: dict[str, str]


def check_plot(path: Path | None) -> None:
    """Check --plot before minutes of measuring. Raises RequestError unless it is a PNG, MissingExtraError without matplotlib.

    Raises DiskError if the file cannot be written.
    """
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise RequestError(f"--plot {path} is not the name of a PNG", remedy="give a file such as speed.png", param="plot")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", extra="benchmark") from error
    with atomic_file(path) as partial:  # writes the file once, to detect a folder that is not writable
        partial.write_bytes(path.read_bytes() if path.is_file() else b"")
    if not path.stat().st_size:
        path.unlink()


def show(found: EngineComparison, facts: BenchmarkFacts) -> None:
    """Print the table, and below it the machine and the versions."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=f"{facts['generator']}: images a second on this machine")
    for heading in ("engine", "device", "batch", "images/s", "quartiles", "ms a call", "to eager", "of the peak"):
        table.add_column(heading, justify="left" if heading in ("engine", "device") else "right", no_wrap=True)
    for number, row in enumerate(found.rows):
        last = number + 1 == len(found.rows) or found.rows[number + 1].batch != row.batch
        table.add_row(*_cells(row), end_section=last)
    console.print(table)
    for line in _lines(found, facts):
        console.print(line, markup=False, soft_wrap=True)


def plot(found: EngineComparison, facts: BenchmarkFacts, path: Path) -> None:
    """Write the PNG, with a line and the quartiles for each engine. Raises DiskError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for name in dict.fromkeys(map(_name, found.rows)):
        rows = [row for row in found.rows if _name(row) == name]
        batches, speeds = [row.batch for row in rows], [row.images_per_s for row in rows]
        style = "--" if name == EAGER else "-"
        (line,) = axes.plot(batches, [speed.median for speed in speeds], style, marker="o", label=name)
        low, high = [speed.low for speed in speeds], [speed.high for speed in speeds]
        axes.fill_between(batches, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:,.4g}")
    axes.set_xticks(sorted({row.batch for row in found.rows}), [str(size) for size in sorted({r.batch for r in found.rows})])
    axes.set_xlabel("batch")
    axes.set_ylabel("images a second")
    axes.set_title(f"{facts['generator']}, {facts['threads']['count']} threads", fontsize=11)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _name(row: SpeedRow) -> str:
    return f"{row.engine}, {row.streams} streams" if row.streams else row.engine


def _cells(row: SpeedRow) -> list[str]:
    speed = row.images_per_s
    return [
        _name(row),
        row.device,
        str(row.batch),
        f"{speed.median:,.4g}",
        f"{speed.low:,.3g} to {speed.high:,.3g}",
        f"{row.latency_ms:,.3g}",
        "" if row.to_eager is None else f"{row.to_eager:.2f}",
        "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}",
    ]


def _lines(found: EngineComparison, facts: BenchmarkFacts) -> list[str]:
    peaks = [f"{name}: {peak['gflops_per_s']:,.0f} GFLOP/s ({peak['by']})" for name, peak in found.peaks.items()]
    gflops = [f"one image: {found.flops_per_image / 1e9:.3g} GFLOP"] if found.flops_per_image else []
    machine, load = facts["machine"], facts["load_average"]
    return [
        *(f"left out: {engine}: {reason}" for engine, reason in found.left_out.items()),
        *gflops,
        *peaks,
        *found.remarks,
        f"medians of {facts['rounds']} rounds of all engines in turn; ratios within a round; eager: torch, float32, contiguous",
        f"{machine['machine']}; {', '.join(machine['abilities']) or 'no AVX2, AVX-512 or AMX'}; "
        f"{facts['threads']['count']} of {machine['cpus_of_machine']} CPUs, threads {facts['threads']['policy']}; "
        f"load {load['before']:.1f} before, {load['after']:.1f} after",
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        facts["command"],
    ]
