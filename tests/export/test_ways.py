"""Of several ways to build an engine the fastest is taken that agrees with something to spare."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engines.outputs import TOLERANCES, Outputs, Tolerance, agreement, to_uint8
from uni_instruct.engines.record import EngineRecord
from uni_instruct.errors import ParityError, RequestError
from uni_instruct.export.parity import MARGIN, verify
from uni_instruct.export.targets import export_engine, find_target
from uni_instruct.system.files import sha256


def test_a_tolerance_is_tightened_in_its_own_unit() -> None:
    tight = Tolerance(relative_l2=0.02, pixel_difference=4, psnr_db=50.0).tightened(0.5)
    assert (tight.relative_l2, tight.pixel_difference) == (0.01, 2)
    # Half of a difference is a quarter of its square: 10 log10(4) more decibels.
    assert tight.psnr_db == pytest.approx(50 + 10 * np.log10(4))
    assert TOLERANCES["fp32"].tightened(MARGIN).pixel_difference == 0
    assert TOLERANCES["fp32"].tightened(MARGIN).psnr_db == 0


def test_a_psnr_is_judged_over_all_images() -> None:
    """One image that is harder than the others refuses no engine, though a batch of its own is tried; a bad batch does."""
    truth = np.random.default_rng(0).uniform(-0.5, 0.5, (64, 1, 8, 8)).astype(np.float32)
    levels = np.ones((64, 1, 1, 1))
    levels[0] = 2
    images = truth + np.where(np.indices(truth.shape).sum(0) % 2, 1, -1) * (levels / 127.5).astype(np.float32)
    whole, hard = (Outputs(to_uint8(made), made) for made in (images, images[:1]))
    found = agreement([hard, whole], truth)
    assert found.psnr_db == pytest.approx(20 * np.log10(255 / np.sqrt((63 + 4) / 64)), abs=0.05)
    assert agreement([hard], truth[:1]).psnr_db < 43
    assert not found.problem(TOLERANCES["int8"])
    spoilt = Outputs(np.zeros_like(hard.pixels), np.full_like(hard.images, -1))
    assert "relative L2" in agreement([spoilt, whole], truth).problem(TOLERANCES["int8"])
    off_by_five = Outputs(to_uint8(truth + 5 / 127.5), truth)
    assert "torch's is 34.2 dB (at least 45 dB is required)" in agreement([off_by_five], truth).problem(TOLERANCES["int8"])


@pytest.mark.slow
def test_the_ways_before_the_one_taken_stray_or_agree_barely(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    target = find_target("openvino-bf16")
    try:
        target.check_machine()
    except RequestError as error:
        pytest.skip(f"openvino-bf16 cannot be had on this machine: {error.problem}")
    path = tmp_path / "digits"
    shutil.copytree(Bundle.open("digits").path, path)
    bundle = Bundle.open(path)
    record = export_engine(bundle, "openvino-bf16")
    assert EngineRecord.read(bundle.engine_folder(target.engine_id)) == record
    builders = target.builders()
    assert record.way in builders
    for way in list(builders)[: list(builders).index(record.way)]:
        folder = tmp_path / way
        folder.mkdir()
        builders[way](bundle, folder / record.file, "bf16")
        # The images that it is tried on follow from the hash.
        built = dataclasses.replace(record, way=way, file_sha256=sha256(folder / record.file))
        with pytest.raises(ParityError):
            verify(bundle, built, folder, with_margin=True)
