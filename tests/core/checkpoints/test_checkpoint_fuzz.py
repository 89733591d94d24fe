"""Thousands of damaged and twisted checkpoints: each ends in a Checkpoint or in an error of the project's own.

A case is a whole file of some format and a number, from which everything about its changes follows: `mutated` makes it again.
The files are read in a process of their own, see checkpoint_worker.py: no case may run anything, hang, kill it, or take memory
out of proportion.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from builders.checkpoint_worker import Worker
from builders.damaged_checkpoints import FORMATS, mutated

# pickletools' own, of strings that changes have broken.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
CASES_QUICKLY, CASES = 100, 1000  # of each format
MAX_MB = 50


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    for index, write in enumerate(FORMATS.values()):
        write(folder / str(index))
    return {form: (folder / str(index)).read_bytes() for index, form in enumerate(FORMATS)}


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def test_a_few_hundred_cases(originals: dict[str, bytes], worker: Worker, tmp_path: Path) -> None:
    ends = [end for form in FORMATS for end in read_cases(worker, originals, form, range(CASES_QUICKLY), tmp_path)]
    # Changes that all fail at the first byte, or none, would test little.
    assert 40 < ends.count("") < len(ends) - 100
    assert len(set(ends)) > 25


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_thousands_of_cases(originals: dict[str, bytes], worker: Worker, tmp_path: Path, form: str) -> None:
    read_cases(worker, originals, form, range(CASES_QUICKLY, CASES_QUICKLY + CASES), tmp_path)


def read_cases(worker: Worker, originals: dict[str, bytes], form: str, seeds: range, folder: Path) -> list[str]:
    """How each case ends: '' for a Checkpoint, else the kind of problem."""
    ends = []
    for seed in seeds:
        path = folder / f"{form.replace(' ', '-')} case {seed}"
        path.write_bytes(mutated(originals, form, seed))
        outcome = worker.read(path)
        assert outcome.is_ours or (outcome.error == "" and outcome.format), (path.name, outcome)
        assert not outcome.events, (path.name, outcome)
        assert outcome.peak_mb < MAX_MB, (path.name, outcome)
        path.unlink()
        ends.append(" ".join(outcome.message.replace(str(path), "").split()[:4]))
    assert list(folder.iterdir()) == []
    return ends
