"""The lab's two pictures: scores over time, and each variant's path through quality and diversity."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uni_instruct.errors import MissingExtraError
from uni_instruct.train.lab.experiments import Lab
from uni_instruct.train.lab.results import Axis, Outcome, metric_name
from uni_instruct.train.report.records import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_IN, DPI = (8.4, 4.6), 120
# Okabe and Ito's colours, which colour-blind readers can tell apart. With more variants the line style changes as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", ":")
LOG_FROM = 8.0  # an axis is logarithmic if largest value / smallest value exceeds this


def draw_distance(file: Path, lab: Lab, outcomes: Sequence[Outcome], teacher: Evaluation | None) -> None:
    """Write a PNG of each experiment's score over thousands of images seen, with the teacher's as a horizontal line."""
    figure, axes = _figure()
    for number, variant in enumerate(lab.variants):
        for index, outcome in enumerate(o for o in outcomes if o.experiment.variant == variant):
            points = outcome.evaluations
            label = variant.name if index == 0 else "_"
            axes.plot(
                [e.kimg for e in points],
                [e.value for e in points],
                label=label,
                marker="o",
                ms=3,
                color=_colour(number),
                linestyle=_style(number),
            )
    if teacher is not None:
        axes.axhline(teacher.value, color="#777", linewidth=1, linestyle=(0, (5, 3)), label=f"teacher, {teacher.value:.3g}")
    values = [e.value for o in outcomes for e in o.evaluations]
    if values and max(values) > LOG_FROM * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("thousands of images seen (kimg)")
    axes.set_ylabel(metric_name(outcomes))
    _save(figure, axes, file)


def draw_paths(file: Path, lab: Lab, outcomes: Sequence[Outcome], quality: Axis, diversity: Axis) -> None:
    """Write a PNG of each experiment's path: x is diversity, y is quality, and points grow with training time."""
    figure, axes = _figure()
    for number, variant in enumerate(lab.variants):
        for index, outcome in enumerate(o for o in outcomes if o.experiment.variant == variant):
            pairs = [(diversity.read(outcome, e), quality.read(outcome, e)) for e in outcome.evaluations]
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            if not known:
                continue
            label = variant.name if index == 0 else "_"
            axes.plot(*zip(*known, strict=True), label=label, alpha=0.8, color=_colour(number), linestyle=_style(number))
            sizes = [8 + 40 * i / len(known) for i in range(1, len(known) + 1)]
            axes.scatter([x for x, _ in known], [y for _, y in known], s=sizes, color=_colour(number))
    axes.set_xlabel(diversity.label)
    axes.set_ylabel(quality.label)
    _save(figure, axes, file)


def _figure() -> tuple["Figure", "Axes"]:
    try:
        from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window system
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", extra="train") from error
    figure = Figure(figsize=SIZE_IN, dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _style(number: int) -> str:
    return STYLES[number // len(COLOURS) % len(STYLES)]


def _save(figure: "Figure", axes: "Axes", file: Path) -> None:
    axes.grid(color="#e6e8ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, facecolor="white", format="png")
