"""A stage's curves as one picture of small panels. Their x axis is the number of images seen, in thousands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uni_instruct.errors import MissingExtraError
from uni_instruct.train.config import Recipe
from uni_instruct.train.dry_run.cost import phases
from uni_instruct.train.optimization.optimizer import RateSchedule
from uni_instruct.train.report.records import Curve, Evaluation, StageHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, INK, GREY = "#2f6690", "#c8702a", "#5b8e55", "#33373b", "#9aa0a6"
COLUMNS, PANEL_IN, DPI = 2, (4.6, 2.35), 120
LOG_FROM = 8.0  # an axis is logarithmic if largest value / smallest value exceeds this
SMOOTHED_FROM = 30  # from this number of points on, a curve is drawn pale with its running median on top
LEGEND_ROOM = 0.22  # share of a panel's height that stays free above the curves, for the legend


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve of a panel. kind: 'noisy' (each point measured on one batch), 'points' (evaluations) or 'exact'."""

    label: str
    curve: Curve
    kind: str = "noisy"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes. level: a horizontal line and its name. mark: an evaluation to circle. bounds: ends of the y axis.

    linear: never use a logarithmic axis.
    """

    title: str
    lines: Sequence[Line]
    level: tuple[float, str] | None = None
    mark: Evaluation | None = None
    bounds: tuple[float, float] | None = None
    linear: bool = False

    @property
    def empty(self) -> bool:
        """Whether the log contains none of its curves."""
        return not any(line.curve.values for line in self.lines)


def panels(stage: str, history: StageHistory, recipe: Recipe, teacher: Evaluation | None) -> list[Panel]:
    """The panels of a stage, without empty ones. teacher: best evaluation of the teacher, if this run trained it."""
    made = [*_scores(history, recipe, teacher), *(_teacher if stage == "teacher" else _generator)(history)]
    made.append(Panel(title="Learning rate", lines=_rates(stage, recipe), linear=True))
    made.append(Panel(title="Images per second, evaluation included", lines=[_line(history, "", "images_per_s")]))
    return [panel for panel in made if not panel.empty]


def draw(file: Path, title: str, shown: Sequence[Panel], edges_kimg: Sequence[float] = ()) -> None:
    """Write the panels as a PNG. edges_kimg: where the objective changes. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window system
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", extra="train") from error
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL_IN[0], rows * PANEL_IN[1] + 0.4), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    end = max(kimg for panel in shown for line in panel.lines for kimg in line.curve.kimg)
    for axes, panel in zip(grid, shown, strict=False):
        _draw_panel(axes, panel, edges_kimg)
        axes.set_xlim(0, 1.02 * end)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(shown) - COLUMNS) : len(shown)]:
        axes.set_xlabel("thousands of images seen (kimg)", fontsize=8, color=INK)
    figure.savefig(file, facecolor="white", format="png")


def draw_steps(file: Path, teacher: Mapping[int, float], student: float, metric: str) -> None:
    """Write a PNG: the teacher's distance over its number of network evaluations, and the student's as a horizontal line.

    teacher: evaluations -> distance. Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", extra="train") from error
    figure = Figure(figsize=(1.4 * PANEL_IN[0], 1.3 * PANEL_IN[1]), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot(list(teacher), list(teacher.values()), "o-", color=BLUE, markersize=4, label="teacher")
    axes.axhline(student, color=ORANGE, linewidth=1.2, linestyle=(0, (5, 3)), label=f"student, 1 evaluation: {student:.3g}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(teacher), [str(evaluations) for evaluations in teacher])
    _set_scale(axes, Panel(title="", lines=()), [*teacher.values(), student])
    axes.set_xlabel("evaluations of the network for an image", fontsize=8, color=INK)
    axes.set_title(metric, loc="left", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    figure.savefig(file, facecolor="white", format="png")


def phase_edges(recipe: Recipe) -> list[float]:
    """Where the generator's objective changes, in kimg: the end of the critic's warm-up, and the starts of later phases."""
    return [phase.from_kimg for phase in phases(recipe)[1:]]


def _scores(history: StageHistory, recipe: Recipe, teacher: Evaluation | None) -> list[Panel]:
    best = history.best(recipe.loop.metric)
    if best is None:
        return []
    level = (teacher.value, f"teacher's best, {teacher.value:.3g}") if teacher else None
    distance = Line(label="", curve=history.curve(best.name), kind="points")
    shares = [_line(history, name, name, "points") for name in ("precision", "recall")]
    return [
        Panel(title=f"{best.name} of {recipe.loop.samples:,} samples", lines=[distance], level=level, mark=best),
        Panel(title="Precision and recall", lines=shares, bounds=(0, 1)),
    ]


def _teacher(history: StageHistory) -> list[Panel]:
    return [
        Panel(title="Loss (denoising, weighted as in EDM)", lines=[_line(history, "", "teacher/loss")]),
        Panel(title="Norm of the gradient", lines=[_line(history, "", "teacher/gradient_norm")]),
    ]


def _generator(history: StageHistory) -> list[Panel]:
    losses = {"fake score": "fake_score/loss", "discriminator": "discriminator/loss"}
    gradients = {"generator": "generator/gradient_norm", "critic": "critic/gradient_norm"}
    health = {
        "diversity": "generator/diversity",
        "accuracy": "discriminator/accuracy",
        "sample size": "ratio/effective_sample_size",
    }
    ratios = {"95 % below": "ratio/q95", "median": "ratio/q50", "5 % below": "ratio/q05"}
    return [
        Panel(title=title, lines=[_line(history, label, name) for label, name in names.items()])
        for title, names in {
            "Losses of the critic": losses,
            "Distance of the teacher's and the fake score's images": {"": "generator/score_distance"},
            "Diversity, discriminator's accuracy, effective sample size": health,
            "Density ratio": ratios,
            "Norm of the gradient": gradients,
        }.items()
    ]


def _rates(stage: str, recipe: Recipe) -> list[Line]:
    """The learning rates, computed from the recipe. They are not logged, because they depend on the step alone."""
    distillation = recipe.distillation
    config = recipe.teacher if stage == "teacher" else distillation
    peaks = {"": recipe.teacher.learning_rate}
    if stage != "teacher":
        peaks = {"generator": distillation.generator_learning_rate, "critic": distillation.critic_learning_rate}
    steps = np.unique(np.linspace(0, config.total_steps - 1, 200).astype(int)).tolist()
    kimg = [(step + 1) * config.batch / 1000 for step in steps]
    return [
        Line(label=name, curve=Curve(kimg, [RateSchedule.of(config, peak).at(step) for step in steps]), kind="exact")
        for name, peak in peaks.items()
    ]


def _line(history: StageHistory, label: str, name: str, kind: str = "noisy") -> Line:
    return Line(label=label, curve=history.curve(name), kind=kind)


def _draw_panel(axes: "Axes", panel: Panel, edges_kimg: Sequence[float]) -> None:
    drawn = [line for line in panel.lines if line.curve.values]
    for line, colour in zip(drawn, (BLUE, ORANGE, GREEN), strict=False):
        _draw_line(axes, line, colour)
    for edge in edges_kimg:
        axes.axvline(edge, color=GREY, linewidth=0.7, linestyle=(0, (1, 3)))
    if panel.level is not None:
        axes.axhline(panel.level[0], color=ORANGE, linewidth=1, linestyle=(0, (5, 3)), label=panel.level[1])
    if panel.mark is not None:
        label = f"best, {panel.mark.value:.3g} after {panel.mark.kimg:.4g} kimg"
        axes.plot([panel.mark.kimg], [panel.mark.value], "o", ms=9, mfc="none", mec=INK, label=label, zorder=5)
    _set_scale(axes, panel, [value for line in drawn for value in line.curve.values])
    axes.set_title(panel.title, loc="left", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.grid(axis="y", color="#e6e8ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            fontsize=7.5, frameon=False, labelcolor=INK, loc="upper right", ncols=3, handlelength=1.4, columnspacing=1.2
        )


def _draw_line(axes: "Axes", line: Line, colour: str) -> None:
    kimg, values, label = line.curve.kimg, line.curve.values, line.label or "_"
    if line.kind == "points":
        axes.plot(kimg, values, color=colour, marker="o", markersize=3, linewidth=1.3, label=label)
    elif line.kind == "exact" or len(values) < SMOOTHED_FROM:
        axes.plot(kimg, values, color=colour, linewidth=1.3, label=label)
    else:
        axes.plot(kimg, values, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(kimg, _running_median(values), color=colour, linewidth=1.4, label=label)


def _running_median(values: Sequence[float]) -> np.ndarray:
    """The centred running median over about a twentieth of the curve, over fewer points at the ends. It removes spikes."""
    # A median also keeps a sudden step in a curve, which a mean would turn into a slope.
    half = max(2, len(values) // 40)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _set_scale(axes: "Axes", panel: Panel, values: Sequence[float]) -> None:
    """Make the y axis logarithmic if the values span a factor of LOG_FROM, and leave room for the legend above them."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    low, high = min(values), max(values)
    if panel.bounds is not None:
        low, high = panel.bounds
        axes.set_ylim(low - 0.03 * (high - low), high + (high - low) * LEGEND_ROOM)
        axes.set_yticks(np.linspace(low, high, 5))
    elif low > 0 and not panel.linear and high > LOG_FROM * low:
        axes.set_yscale("log")
        # On a logarithmic axis the room for the legend is a factor: top (top / bottom)^LEGEND_ROOM.
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** LEGEND_ROOM)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top + (top - bottom) * LEGEND_ROOM)
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
