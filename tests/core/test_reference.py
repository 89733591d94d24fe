"""reference.npz: torch's images of the stored weights, written whoever writes the bundle, and nothing else taken for it."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import random_bundle
from builders.paths import FORMAT_1
from uni_instruct.bundle import CONFIG, Bundle
from uni_instruct.engine import TORCH, open_engine
from uni_instruct.errors import BundleError
from uni_instruct.networks.reference import make_reference
from uni_instruct.reference import REFERENCE, REFERENCE_IMAGES, reference_inputs
from uni_instruct.spec import ModelSpec


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    weights = tiny_bundle.weights()
    return Bundle.write(tmp_path / "bundle", tiny_bundle.spec, weights, "", precision="fp16", reference=make_reference)


def test_it_holds_torchs_images_of_the_weights_as_they_are_stored(bundle: Bundle, tiny_bundle: Bundle) -> None:
    reference = bundle.reference()
    assert reference is not None
    assert reference.seeds.tolist() == list(range(REFERENCE_IMAGES))
    outputs = open_engine(bundle, TORCH).outputs(reference.noise(bundle.spec), reference.class_ids)
    np.testing.assert_array_equal(outputs.images, reference.images)
    full = open_engine(tiny_bundle, TORCH).outputs(reference.noise(bundle.spec), reference.class_ids)
    assert np.abs(full.images - reference.images).max() > 1e-5, "half precision cannot be told from full"


def test_the_same_weights_give_the_same_file(bundle: Bundle, tmp_path: Path) -> None:
    again = Bundle.write(tmp_path / "again", bundle.spec, bundle.weights(), "", precision="fp16", reference=make_reference)
    assert (again.path / REFERENCE).read_bytes() == (bundle.path / REFERENCE).read_bytes()


@pytest.mark.parametrize("classes", [0, 2, 10, 16, 1000])
def test_it_sees_every_class_or_as_many_as_it_has_images(classes: int) -> None:
    _, class_ids = reference_inputs(ModelSpec(name="s", noise_shape=(1, 2, 2), num_classes=classes))
    if class_ids is None:
        assert classes == 0
    else:
        assert len(np.unique(class_ids)) == min(classes, REFERENCE_IMAGES)
        assert class_ids.max() < classes
        assert class_ids.dtype == np.int64


def test_without_classes_there_are_no_class_ids(tmp_path: Path) -> None:
    odd = random_bundle(tmp_path / "odd", seed=3, num_classes=0, image_shape=(3, 12, 8))
    odd.upgrade_format(make_reference)
    reference = odd.reference()
    assert reference is not None
    assert reference.class_ids is None
    assert reference.images.shape == (REFERENCE_IMAGES, 3, 12, 8)


def test_a_teacher_has_none(tiny_teacher: Bundle, tmp_path: Path) -> None:
    copy = Bundle.write(tmp_path / "copy", tiny_teacher.spec, tiny_teacher.weights(), "", reference=make_reference)
    assert not (copy.path / REFERENCE).exists()
    assert copy.reference() is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def mark(path: Path, place: int, value: int) -> None:
    """Writes a byte into the zip's own table, in the entry of the first array."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + place] = value
    path.write_bytes(content)


def claim(path: Path, shape: str) -> None:
    """An array whose header gives that shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("seeds.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def rewrite(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with np.load(path) as data:
            arrays = dict(data) | changes
        np.savez(path, allow_pickle=True, **arrays)

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "cannot be read"),
    "no npz": (lambda path: path.write_bytes(b"nothing"), "cannot be read: it is not an npz file$"),
    "first byte": (lambda path: path.write_bytes(b"Q" + path.read_bytes()[1:]), "cannot be read: it is not an npz file$"),
    "encrypted": (lambda path: mark(path, 8, 1), "cannot be read"),
    "packed in an unknown way": (lambda path: mark(path, 10, 99), "cannot be read"),
    "more than any memory": (lambda path: claim(path, "(10 ** 15,)"), "cannot be read"),
    "header cut": (lambda path: claim(path, "((("), "cannot be read"),
    "objects": (rewrite(images=np.array([{}], dtype=object)), "cannot be read"),
    "other weights": (rewrite(weights_sha256=np.array("0" * 64)), "was made from other weights"),
    "other shape": (rewrite(images=np.zeros((16, 3, 8, 8), np.float32)), "does not hold images of generator 'tiny'"),
    "other type": (rewrite(images=np.zeros((16, 1, 8, 8), np.float64)), "does not hold images"),
    "class out of range": (rewrite(class_ids=np.full(16, 10)), "does not hold images"),
    "too few classes": (rewrite(class_ids=np.zeros(3, np.int64)), "does not hold images"),
    "negative seeds": (rewrite(seeds=np.arange(-1, 15)), "does not hold images"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_told_and_written_anew(damage: str, bundle: Bundle) -> None:
    inflict, message = DAMAGE[damage]
    whole = (bundle.path / REFERENCE).read_bytes()
    inflict(bundle.path / REFERENCE)
    with pytest.raises(BundleError) as caught:
        bundle.reference()
    assert re.search(message, caught.value.problem)
    bundle.upgrade_format(make_reference)
    assert (bundle.path / REFERENCE).read_bytes() == whole


def test_format_1_is_brought_up_to_date_once(tmp_path: Path) -> None:
    former = Bundle.open(shutil.copytree(FORMAT_1, tmp_path / "digits"))
    assert former.reference() is None
    former.upgrade_format(make_reference)
    now = Bundle.open(former.path)
    assert json.loads((now.path / CONFIG).read_text())["format_version"] == 2
    assert (now.spec, now.weights_sha256) == (former.spec, former.weights_sha256)
    assert now.reference() is not None

    def never(bundle: Bundle) -> None:
        raise AssertionError("nothing is left to do")

    now.upgrade_format(never)


def test_another_generators_reference_is_refused(bundle: Bundle, tmp_path: Path) -> None:

    other = random_bundle(tmp_path / "other", seed=9, num_classes=0)

    shutil.copy(bundle.path / REFERENCE, other.path / REFERENCE)
    with pytest.raises(BundleError, match="was made from other weights than those in its folder; 'uni-instruct export"):
        other.reference()
