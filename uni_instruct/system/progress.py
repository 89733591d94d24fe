"""Progress of long work on standard error: a bar with rate and remaining time on a terminal, plain lines otherwise."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from uni_instruct.system.printable import printable

LINE_EVERY_S = 10.0


class Progress(Protocol):
    """A display of progress. Code that does long work calls it as the work advances."""

    def advance(self, amount: int, note: str | None = None) -> None:
        """Add `amount` units of finished work. note: a short state to show, such as a loss; None keeps the previous one."""
        ...


# Library functions take one of these to report their progress: `progress` below shows it, `silent` does not.
ProgressFactory = Callable[[str, int, str], AbstractContextManager[Progress]]


@contextmanager
def silent(label: str, total: int, unit: str) -> Iterator[Progress]:
    """Show nothing."""
    yield _Silent()


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show progress with this label until the block ends.

    total: the amount of work, in `unit`. done: how much of it an earlier run has finished; it does not count in the rate.
    """
    label = printable(label)  # a label may contain a path
    if sys.stderr.isatty():
        yield from _bar(label, total, unit, done)
    else:
        yield _Lines(label, total, unit, done)


class _OnStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def log_to_stderr(name: str) -> None:
    """Print this logger's messages of level INFO and above as lines on standard error, for the command line."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _OnStandardError) for handler in logger.handlers):
        logger.addHandler(_OnStandardError())


class _Silent:
    def advance(self, amount: int, note: str | None = None) -> None:
        pass


class _Lines:
    def __init__(self, label: str, total: int, unit: str, done: int):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.start = self.last_line = time.monotonic()
        self.note = ""
        print(f"{label}: {done}/{total} {unit}", file=sys.stderr, flush=True)

    def advance(self, amount: int, note: str | None = None) -> None:
        self.done += amount
        self.note = self.note if note is None else note
        now = time.monotonic()
        if now - self.last_line < LINE_EVERY_S and self.done < self.total:
            return
        self.last_line = now
        line = f"{self.label}: {self.done}/{self.total} {self.unit}"
        if self.done > self.first:  # without any finished work there is no rate
            rate = (self.done - self.first) / max(now - self.start, 1e-9)
            line += f", {rate:.1f} {self.unit}/s, {(self.total - self.done) / rate:.0f} s left"
        print(f"{line}, {self.note}" if self.note else line, file=sys.stderr, flush=True)


def _bar(label: str, total: int, unit: str, done: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),  # "photos[/old]" is a path
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, note="", rate="")

        class OnBar:
            def advance(self, amount: int, note: str | None = None) -> None:
                speed = bar.tasks[0].speed
                note = bar.tasks[0].fields["note"] if note is None else note
                bar.update(task, advance=amount, note=note, rate=f"{speed:.1f}/s" if speed else "")

        yield OnBar()
