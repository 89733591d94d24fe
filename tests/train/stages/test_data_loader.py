"""Batches are what they are, whoever reads them and when: order, memory and errors with several threads."""

import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from uni_instruct.data import Dataset
from uni_instruct.data.storage import ZipStore
from uni_instruct.errors import FileFormatError
from uni_instruct.train.stages import data_loader
from uni_instruct.train.stages.data_loader import AHEAD, DataLoader

COUNT, BATCH, SIDE = 20, 8, 4
CPU = torch.device("cpu")
WHOLE = slice(0, BATCH)
HALVES = (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))


class Numbered:
    """Images whose pixels are their number. `before` is called with the numbers before they are handed out."""

    def __init__(self, before: Callable[[np.ndarray], None] = lambda indices: None):
        self.before = before

    def __len__(self) -> int:
        return COUNT

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.before(indices)
        return np.broadcast_to(indices[:, None, None, None], (len(indices), SIDE, SIDE, 1)).astype(np.uint8)


def dataset_of(reader: Numbered) -> Dataset:
    return Dataset(
        name="numbered",
        image_shape=(1, SIDE, SIDE),
        labels=np.arange(COUNT),
        num_classes=COUNT,
        class_names=tuple(map(str, range(COUNT))),
        licence="",
        source="numbered",
        reader=reader,
    )


def expected(step: int) -> list[int]:
    """The numbers of a batch: places 8 step to 8 step + 7 of epochs that are shuffled by seed and number."""
    places = range(step * BATCH, (step + 1) * BATCH)
    return [int(np.random.default_rng([0, p // COUNT]).permutation(COUNT)[p % COUNT]) for p in places]


def numbers(images: Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("parts", [(WHOLE,), HALVES])
def test_batches_are_those_of_seed_and_step_whatever_thread_is_first(parts: tuple[slice, ...]) -> None:
    def dawdle(indices: np.ndarray) -> None:
        time.sleep(0.002 * (indices[0] % 3))  # in no order that the steps are in

    loader = DataLoader(dataset_of(Numbered(dawdle)), BATCH, seed=0)
    for step in range(12):  # several epochs, whose ends fall into batches
        read = [loader(step, part, CPU) for part in parts]
        assert numbers(torch.cat([images for images, _ in read])) == expected(step)
        assert torch.cat([ids for _, ids in read if ids is not None]).tolist() == expected(step)


def test_a_late_batch_is_waited_for_while_the_next_ones_are_read() -> None:
    """The first batch is held back until another has been read: with one reader that would be never."""
    others = threading.Event()

    def hold(indices: np.ndarray) -> None:
        if indices.tolist() == expected(0):
            assert others.wait(timeout=60)
        else:
            others.set()

    loader = DataLoader(dataset_of(Numbered(hold)), BATCH, seed=0)
    assert [numbers(loader(step, WHOLE, CPU)[0]) for step in range(3)] == [expected(step) for step in range(3)]


def test_steps_may_jump_as_where_a_phase_changes_the_number_of_critic_updates() -> None:
    loader = DataLoader(dataset_of(Numbered()), BATCH, seed=0)
    for step in (0, 1, 50, 51, 10, 11, 12, 0):
        assert numbers(loader(step, WHOLE, CPU)[0]) == expected(step)


@pytest.mark.parametrize(("room", "ahead"), [(2**30, AHEAD), (0, 1)])
def test_no_more_is_read_ahead_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch, room: int, ahead: int) -> None:
    monkeypatch.setattr(data_loader, "AHEAD_BYTES", room)
    begun: list[int] = []
    loader = DataLoader(dataset_of(Numbered(lambda indices: begun.append(len(indices)))), BATCH, seed=0)
    for step in range(10):
        loader(step, WHOLE, CPU)
        assert len(begun) <= step + 1 + ahead
    assert loader.ahead == ahead


def test_an_error_is_raised_at_the_step_that_the_batch_is_for_and_again_when_asked_again() -> None:
    def break_third(indices: np.ndarray) -> None:
        if indices.tolist() == expected(2):
            raise FileFormatError("image is broken", remedy="replace it")

    loader = DataLoader(dataset_of(Numbered(break_third)), BATCH, seed=0)
    assert [numbers(loader(step, WHOLE, CPU)[0]) for step in (0, 1)] == [expected(0), expected(1)]
    for _ in range(2):
        with pytest.raises(FileFormatError, match="image is broken"):
            loader(2, WHOLE, CPU)
    assert numbers(loader(3, WHOLE, CPU)[0]) == expected(3)


def test_a_zip_gives_many_threads_what_it_gives_to_one(tmp_path: Path) -> None:
    """An open file has one position: threads that shared it would read each other's places, once in a thousand times."""
    rng, before = np.random.default_rng(0), sys.getswitchinterval()
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for number in range(24):
            archive.writestr(str(number), rng.bytes(30_000))  # more than a file's buffer
    store = ZipStore(tmp_path / "data.zip")
    contents = {name: store.read(name) for name in store.names()}

    def wrong(seed: int) -> list[str]:
        return [name for name in np.random.default_rng(seed).permutation(list(contents)) if store.read(name) != contents[name]]

    sys.setswitchinterval(1e-6)  # so that threads take turns in the middle of a read
    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(wrong, range(256))) == [[]] * 256
    finally:
        sys.setswitchinterval(before)
