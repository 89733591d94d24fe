"""Bundles of format 1, which wrote an engine into engines/onnx and called its noise latents: the digits that shipped then."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import ONNX
from builders.paths import FORMAT_1
from uni_instruct.bundle import CONFIG, Bundle
from uni_instruct.engine import TORCH, available_engines, open_engine
from uni_instruct.engines.record import RECORD
from uni_instruct.errors import RequestError
from uni_instruct.export.targets import export_engine
from uni_instruct.generate import generate_images, mix_classes, resolve_class_ids
from uni_instruct.noise import noise

SEEDS = range(32)


@pytest.fixture
def digits(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(FORMAT_1, tmp_path / "digits"))


def test_its_spec_is_read_as_one_of_today() -> None:
    assert json.loads((FORMAT_1 / CONFIG).read_text())["format_version"] == 1
    former, now = Bundle.open(FORMAT_1).spec, Bundle.open("digits").spec
    training = {"network_args": now.network_args, "provenance": now.provenance}
    assert replace(former, **training) == now
    assert former.network_args["model_channels"] == 32


def test_its_engine_is_found_under_the_name_that_it_has_now(digits: Bundle) -> None:
    assert available_engines(digits) == [ONNX, TORCH]
    stored = digits.engines()[ONNX]
    record = stored.record()
    assert (stored.folder.name, record.id) == ("onnx", ONNX)
    assert record.parity["largest_pixel_difference"] == 0
    assert record.parity["tolerance"] == {"relative_l2": 1e-5, "pixel_difference": 1}


def test_its_engines_make_the_images_that_it_made_when_it_shipped(digits: Bundle) -> None:
    """The images were made by the last version that shipped these weights, in its own format and by its own engine."""
    expected = np.load(FORMAT_1.with_name("digits-format-1-images.npy"))
    assert len(np.unique(expected, axis=0)) == len(SEEDS)
    for engine_id in available_engines(digits):
        found = generate_images(open_engine(digits, engine_id), SEEDS, resolve_class_ids(digits.spec, SEEDS))
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_its_exported_engine_mixes_no_classes_and_says_how_one_does(digits: Bundle) -> None:
    former, torchs = open_engine(digits, ONNX), open_engine(digits, TORCH)
    assert (former.mixes_classes, torchs.mixes_classes) == (False, True)
    inputs = noise([7], digits.spec.noise_shape), mix_classes(digits.spec, 1, 3, 0.5)
    remedy = f"run 'uni-instruct export {digits.path} --to onnx --precision fp32'"
    with pytest.raises(RequestError, match=f"by an older version, and cannot mix classes; {remedy}"):
        former(*inputs)
    export_engine(digits, str(ONNX))
    now = open_engine(digits, ONNX)
    assert np.abs(now(*inputs).astype(int) - torchs(*inputs)).max() <= 1


def test_an_engine_that_was_exported_since_is_preferred(digits: Bundle) -> None:
    newer = digits.engine_folder(ONNX)
    shutil.copytree(digits.engines()[ONNX].folder, newer)
    assert digits.engines()[ONNX].folder == newer
    shutil.rmtree(newer.with_name("onnx"))
    assert (digits.engines()[ONNX].folder / RECORD).is_file()
