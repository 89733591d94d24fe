"""Data is streamed: what is held does not grow with what is read, and little for each image of a zip."""

import gc
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import npy, png
from uni_instruct.data import Dataset, open_dataset

COUNT, SIDE, BATCH = 4000, 48, 64
KB = 1024


@pytest.fixture(scope="module")
def zips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """4,000 images, and as many latents, that would fill 28 and 74 MB."""
    folder, rng = tmp_path_factory.mktemp("zips"), np.random.default_rng(0)
    image = png(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    latent = npy(rng.random((8, 24, 24), dtype=np.float32))
    made = {}
    for kind, content, suffix in (("images", image, "png"), ("latents", latent, "npy")):
        made[kind] = folder / f"{kind}.zip"
        with zipfile.ZipFile(made[kind], "w") as archive:
            names = [f"{i // 1000:05d}/img{i:08d}.{suffix}" for i in range(COUNT)]
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), content)
            archive.writestr("dataset.json", json.dumps({"labels": [[name, 3] for name in names]}))
    return made


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_reading_a_zip_holds_no_more_at_the_end_than_at_the_beginning(zips: dict[str, Path], kind: str) -> None:
    dataset = open_dataset(zips[kind])
    batch_kb = dataset.stored(range(BATCH)).nbytes / KB
    # NumPy reads the head of each npy by ast.literal_eval, which leaves a cycle of references. A server that another test ran
    # in this process makes collections of these rare. They are quick where nothing else is walked.
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    gc.freeze()
    tracemalloc.start()
    try:
        read(dataset, BATCH * 2)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        read(dataset, COUNT)
        _, peak = tracemalloc.get_traced_memory()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.set_threshold(*thresholds)
    assert (after - before) / KB < 128  # 4,000 images; other tests of the same process leave some kilobytes
    assert (peak - before) / KB < 2 * batch_kb + 512


def test_opening_a_zip_holds_some_hundred_bytes_an_image(zips: dict[str, Path]) -> None:
    """So that ImageNet's 1.3 million take 300 MB and not a gigabyte in every process."""
    open_dataset(zips["images"])
    tracemalloc.start()
    try:
        dataset = open_dataset(zips["images"])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset) == COUNT
    assert held / COUNT < 250


def read(dataset: Dataset, count: int) -> None:
    for start in range(0, count, BATCH):
        dataset.stored(range(start, min(start + BATCH, count)))
