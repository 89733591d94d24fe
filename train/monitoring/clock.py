"""Where a run's time goes: seconds by stage and activity, kept in the run's folder so that they add up when it is resumed."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uni_instruct.system.files import JSON_ERRORS, atomic_file

TIME_FILE = "time.json"
TIMED_STAGES = ("teacher", "generator", "run")  # run: what belongs to neither
Times = dict[str, dict[str, float]]  # stage -> activity -> seconds
_log = logging.getLogger(__name__)


class Clock:
    """Counts seconds by stage and activity, on top of those in the folder's time.json. Only the first process writes."""

    def __init__(self, folder: Path, *, first_process: bool = True):
        self.file, self.first_process = folder / TIME_FILE, first_process
        self._times = read_times(folder)
        self._open: list[tuple[str, str]] = []
        self._since = time.monotonic()

    @contextmanager
    def during(self, stage: str, activity: str) -> Iterator[None]:
        """Count the time of the block as that activity. Nested blocks count only as their own activity."""
        # The time so far belongs to the enclosing block.
        self._lap()
        self._open.append((stage, activity))
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def add(self, stage: str, activity: str, time_s: float) -> None:
        """Add seconds to an activity, for example those that passed before the clock existed."""
        activities = self._times.setdefault(stage, {})
        activities[activity] = activities.get(activity, 0.0) + time_s

    def share(self, stage: str, activity: str) -> float:
        """The activity's share of the stage's time so far, in 0..1: its seconds / the seconds of all activities."""
        self._lap()
        spent = self._times.get(stage, {})
        return spent.get(activity, 0.0) / max(sum(spent.values()), 1e-9)

    def write(self) -> None:
        """Write the times to time.json. A run that is killed loses only the time since the last write."""
        self._lap()
        if self.first_process:
            with atomic_file(self.file) as partial:
                partial.write_text(json.dumps(self._times, indent=2) + "\n")

    def _lap(self) -> None:
        now = time.monotonic()
        if self._open:
            self.add(*self._open[-1], now - self._since)
        self._since = now


def read_times(folder: Path) -> Times:
    """The times in a run's time.json; empty if there is no such file. A damaged file counts as empty, with a warning."""
    file = folder / TIME_FILE
    if not file.exists():
        return {}
    try:
        stages = json.loads(file.read_text())
        times = {stage: {name: float(seconds) for name, seconds in parts.items()} for stage, parts in stages.items()}
        return {stage: parts for stage, parts in times.items() if stage in TIMED_STAGES}
    except (*JSON_ERRORS, TypeError, AttributeError, OverflowError) as error:
        _log.warning("%s cannot be read and starts again from zero: %s", file, error)
        return {}
