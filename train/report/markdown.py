"""Small parts of Markdown: escaped text, tables, pictures, numbers with their spread, durations."""

import re
import statistics
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def text(words: str) -> str:
    """The words on one line, with Markdown's special characters escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(words.split()))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> list[str]:
    """A table's lines. Columns from index numbers_from on are aligned to the right. Cells must be valid Markdown."""
    rule = ["---" if column < numbers_from else "---:" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def picture(file: str, description: str) -> str:
    """A picture from the folder report/, with a description as alternative text."""
    return f"![{text(description)}](report/{file})"


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation (over n - 1); a single value is shown without a deviation."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {statistics.stdev(values):.1g}"


def duration(time_s: float) -> str:
    """A duration in seconds below 2 minutes, in minutes below 2 hours, else in hours and minutes."""
    if time_s < 120:
        return f"{time_s:.3g} s"
    minutes = round(time_s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
