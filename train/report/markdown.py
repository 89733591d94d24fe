"""Markdown's small parts: text as it is, tables, numbers with a spread."""

import re
import statistics
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def text(words: str) -> str:
    """The words on one line, none of them taken for Markdown."""
    return _SPECIAL.sub(r"\\\1", " ".join(words.split()))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> list[str]:
    """A table; columns from numbers_from on are aligned to the right. Cells are Markdown already."""
    rule = ["---" if column < numbers_from else "---:" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def picture(file: str, description: str) -> str:
    """A picture of the report's folder."""
    return f"![{text(description)}](report/{file})"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of a single value, the value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {statistics.stdev(values):.1g}"


def duration(time_s: float) -> str:
    """In the unit that people would say it in."""
    if time_s < 120:
        return f"{time_s:.3g} s"
    minutes = round(time_s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
