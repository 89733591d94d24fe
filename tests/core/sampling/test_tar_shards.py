"""Tar shards: webdataset reads them, they are read back, and they score as the same images in any other form."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.data import open_dataset
from uni_instruct.errors import FileFormatError
from uni_instruct.sampling import read_samples, tar_shards
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tars(tiny_bundle: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seventy images in three tars, and the same as an npz beside them."""
    monkeypatch.setattr(tar_shards, "TAR_IMAGES", 30)
    for name in ("out.wds", "out.npz"):
        assert cli("generate", tiny_bundle.path, "--seeds", "5-74", "--out", tmp_path / name)[0] == 0
    return tmp_path / "out.wds"


def test_webdataset_reads_them(tars: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    truth = read_samples(tars.with_name("out.npz"))
    urls = sorted(str(path) for path in tars.glob("*.tar"))
    assert [Path(url).name for url in urls] == ["000000.tar", "000001.tar", "000002.tar"]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls", "json", "__key__"))
    assert [key for *_, key in read] == [f"{index:09d}" for index in range(70)]
    np.testing.assert_array_equal(np.stack([np.asarray(image.convert("L")) for image, *_ in read]), truth.images[..., 0])
    assert truth.class_ids is not None
    assert [class_id for _, class_id, *_ in read] == truth.class_ids.tolist()
    assert [facts["seed"] for _, _, facts, _ in read] == truth.seeds.tolist()


def test_the_manifest_has_every_tar_s_hash_and_the_request(tars: Path) -> None:
    manifest = json.loads((tars / "manifest.json").read_text())
    assert [file["images"] for file in manifest["files"]] == [30, 30, 10]
    for file in manifest["files"]:
        assert sha256(tars / file["name"]) == file["sha256"]
        assert (tars / file["name"]).stat().st_size == file["bytes"]
    assert manifest["request"] == read_samples(tars.with_name("out.npz")).request


def test_they_are_read_back_and_are_a_data_set(tars: Path) -> None:
    truth, samples, dataset = read_samples(tars.with_name("out.npz")), read_samples(tars), open_dataset(tars)
    np.testing.assert_array_equal(samples.images, truth.images)
    np.testing.assert_array_equal(samples.class_ids, truth.class_ids)  # type: ignore[arg-type]
    np.testing.assert_array_equal(dataset.images(range(70)), truth.images)
    np.testing.assert_array_equal(dataset.labels, truth.class_ids)  # type: ignore[arg-type]
    assert (dataset.num_classes, dataset.class_names[3], dataset.note) == (10, "3", "")
    assert len(open_dataset(tars / "000002.tar")) == 10
    assert len(read_samples(tars, count=33).images) == 33


def test_the_same_set_has_the_same_bytes_and_is_complete(tars: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    again = tars.with_name("again.wds")
    assert cli("generate", tiny_bundle.path, "--seeds", "5-74", "--out", again)[0] == 0
    assert {path.name: sha256(path) for path in again.iterdir()} == {path.name: sha256(path) for path in tars.iterdir()}
    assert "was complete" in cli("generate", tiny_bundle.path, "--seeds", "5-74", "--out", again)[1]
    code, _, err = cli("generate", tiny_bundle.path, "--seeds", "5-75", "--out", again)
    assert (code, "holds the images of another request (images 70 there, 71 here" in err) == (2, True)


def test_latents_go_into_tars_as_floats(tmp_path: Path, cli: Cli) -> None:
    bundle = random_bundle(tmp_path / "latents", seed=3, num_classes=0, image_shape=(4, 8, 8), latents=True)
    for name in ("out.wds", "out.npz"):
        assert cli("generate", bundle.path, "--seeds", "0-2", "--out", tmp_path / name)[0] == 0
    np.testing.assert_array_equal(read_samples(tmp_path / "out.wds").images, read_samples(tmp_path / "out.npz").images)


def test_damage_is_told(tars: Path, tmp_path: Path) -> None:
    first, content = tars / "000000.tar", (tars / "000000.tar").read_bytes()
    changed = bytearray(content)
    changed[520] ^= 1
    first.write_bytes(changed)
    with pytest.raises(FileFormatError, match=r"000000\.tar has changed since it was written; copy or generate it again"):
        read_samples(tars)
    first.write_bytes(content[:4096])
    with pytest.raises(FileFormatError, match=r"000000\.tar has 4096 bytes, manifest\.json says"):
        open_dataset(tars)
    (tmp_path / "empty.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(FileFormatError, match=r"empty\.tar is not a whole tar"):
        open_dataset(tmp_path / "empty.tar")


def test_others_tars_of_mixed_sizes_and_half_classes_are_refused(tars: Path, tmp_path: Path, cli: Cli) -> None:
    from uni_instruct.images import encode

    def write(name: str, members: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data in members.items():
                (tmp_path / "member").write_bytes(data)
                archive.add(tmp_path / "member", member)
        return tmp_path / name

    small, large = encode(np.zeros((8, 8, 1), np.uint8)), encode(np.zeros((9, 8, 1), np.uint8))
    code, _, err = cli("evaluate", write("mixed.tar", {f"{i}.png": small if i < 9 else large for i in range(10)}),
                       "--reference", "digits")  # fmt: skip
    assert code == 2
    assert "9.png in " in err.splitlines()[-1]
    with pytest.raises(FileFormatError, match=r"half\.tar has no b\.cls; give every image a class, or none"):
        open_dataset(write("half.tar", {"a.png": small, "a.cls": b"1", "b.png": small}))
    with pytest.raises(FileFormatError, match=r"a\.cls in .* holds 'cat', not a class id; write class ids below"):
        open_dataset(write("words.tar", {"a.png": small, "a.cls": b"cat"}))
