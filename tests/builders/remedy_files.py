# ruff: noqa: E501
"""Files of data and of statistics that are refused, and how each remedy is followed."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from builders.data_sets import grey_zip, write_idx, zip_of
from builders.remedy_stages import GREY, said
from builders.remedy_values import Value, found
from uni_instruct.checkpoints.latent_map import find_latent_map
from uni_instruct.class_map import match_classes
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.data.concat import with_classes
from uni_instruct.data.idx import open_idx
from uni_instruct.evaluate.statistics import Statistics, open_reference, write_statistics

PICTURES = {"class_name": "StandardRGBEncoder"}
IMAGES = np.zeros((4, 4, 4, 1), np.uint8)


def locked(tmp: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """A zip that is packed by a method, or where it is only stored, encrypted by its flags."""
    with zipfile.ZipFile(tmp / "x.zip", "w", method) as archive:
        archive.writestr("a.png", GREY)
    if method == zipfile.ZIP_STORED:
        content = bytearray((tmp / "x.zip").read_bytes())
        content[6] |= 1
        content[content.index(b"PK\1\2") + 8] |= 1
        (tmp / "x.zip").write_bytes(content)
    return tmp / "x.zip"


def unpacked(tmp: Path) -> Path:
    (tmp / "x").mkdir()
    (tmp / "x" / "a.png").write_bytes(GREY)
    return tmp / "x"


def npz(tmp: Path, **arrays: Any) -> Path:
    np.savez(tmp / "x.npz", **arrays)
    return tmp / "x.npz"


def data(tmp: Path, **arrays: Any) -> Dataset:
    return open_dataset(npz(tmp, **arrays))


def statistics(tmp: Path, size: int = 2048, **arrays: Any) -> object:
    return open_reference(npz(tmp, **{"mu": np.zeros(size), "sigma": np.eye(size), **arrays}))


def saved(tmp: Path) -> object:
    """As `evaluate --save-statistics` writes them, of another extractor."""
    write_statistics(Statistics(name="x", mu=np.zeros(8), sigma=np.eye(8), extractor="classifier"), tmp / "s.npz")
    return open_reference(tmp / "s.npz")


def idx(tmp: Path, labels: np.ndarray, without: str = "") -> Dataset:
    write_idx(tmp, IMAGES[..., 0], labels)
    for path in tmp.glob(f"{without}*ubyte" if without else "none"):
        path.unlink()
    return open_idx(tmp)


def both(tmp: Path, first: list[int], second: list[int], side: int = 4, **form: int) -> Dataset:
    """Two data sets as one, each with an image of each class id."""
    grey_zip(tmp / "a.zip", range(len(first)), list(first))
    grey_zip(tmp / "b.zip", range(len(second)), list(second), side)
    return open_dataset(f"{tmp}/a.zip,{tmp}/b.zip", **form)


Z, S, C, T, M = (
    "uni_instruct/data/storage.py",
    "uni_instruct/data/sources.py",
    "uni_instruct/data/concat.py",
    "uni_instruct/evaluate/statistics.py",
    "uni_instruct/checkpoints/latent_map.py",
)
LABELS = np.zeros(4, np.uint8)
FILES = [
    Value(S, "{} has {}", lambda tmp: data(tmp, arr_0=IMAGES.astype("f4")), lambda remedy, tmp: data(tmp, **{found(r"as (\w+),", remedy): IMAGES.astype(found(r", (\w+) \[", remedy))})),
    Value(S, "{} has {} of {} {}", lambda tmp: data(tmp, arr_0=IMAGES, labels=np.zeros(4)), lambda remedy, tmp: data(tmp, arr_0=IMAGES, labels=said(remedy, "integers [N]", LABELS))),
    Value(S, "{} has class id", lambda tmp: data(tmp, arr_0=IMAGES, labels=np.full(4, 10**9)),
          lambda remedy, tmp: data(tmp, arr_0=IMAGES, labels=np.full(4, min(9, int(found(r"below (\d+)", remedy)) - 1)))),
    Value(S, "{} is not a data set", lambda tmp: (tmp / "x.txt").write_text("x") and open_dataset(tmp / "x.txt"),
          lambda remedy, tmp: said(remedy, "zip", open_dataset(grey_zip(tmp / "a.zip", [1])))),
    Value(C, "data set '{}' has no classes", lambda tmp: with_classes(data(tmp, arr_0=IMAGES), 3),
          lambda remedy, tmp: said(remedy, "leave the number of classes out", data(tmp, arr_0=IMAGES))),
    Value(C, "{} has {}, {} {}", lambda tmp: both(tmp, [0, 1], [0, 1, 2]),
          lambda remedy, tmp: both(tmp, [0, 1], [0, 1, 2], num_classes=said(remedy, "--num-classes", 3))),
    Value("uni_instruct/data/idx.py", "IDX files in {} have shapes", lambda tmp: idx(tmp, np.zeros((4, 2), np.uint8)),
          lambda remedy, tmp: idx(tmp, said(remedy, "labels [N]", LABELS))),
    Value("uni_instruct/data/idx.py", "{} has no {} or", lambda tmp: idx(tmp, LABELS, "train-labels"), lambda remedy, tmp: idx(tmp, said(remedy, "all IDX files", LABELS))),
    Value("uni_instruct/data/labels.py", "{} in {} is not JSON", lambda tmp: open_dataset(zip_of(tmp / "x.zip", {"a.png": GREY}, "{")),
          lambda remedy, tmp: said(remedy, "prepare it again", open_dataset(zip_of(tmp / "x.zip", {"a.png": GREY}, json.dumps({"labels": None}))))),
    Value(Z, "{} is encrypted", lambda tmp: open_dataset(locked(tmp)), lambda remedy, tmp: said(remedy, "unpack it with its password", open_dataset(unpacked(tmp)))),
    Value(Z, "(_check_packing)", lambda tmp: open_dataset(locked(tmp, zipfile.ZIP_BZIP2)),
          lambda remedy, tmp: said(remedy, "unpack it and give the folder", open_dataset(unpacked(tmp)))),
    Value(T, "mu and sigma in {}", lambda tmp: statistics(tmp, mu=np.array(["a"])), lambda remedy, tmp: statistics(tmp, mu=said(remedy, "mu [D]", np.zeros(2048)))),
    Value(T, "{} has mu {}", lambda tmp: statistics(tmp, mu=np.zeros(3)), lambda remedy, tmp: statistics(tmp, mu=said(remedy, "mu [D]", np.zeros(2048)))),
    Value(T, "{} has {}", lambda tmp: open_reference(npz(tmp, pool_3=np.zeros((4, 4), int))),
          lambda remedy, tmp: open_reference(npz(tmp, pool_3=np.random.default_rng(0).random((8, int(found(r"N, (\d+)", remedy))))))),
    Value(T, "{} has {} features", lambda tmp: statistics(tmp, 768), lambda remedy, tmp: said(remedy, "--save-statistics", saved(tmp))),
    Value(M, "the network makes {} channels, EDM2's", lambda _: find_latent_map({}, 3, True),
          lambda remedy, _: find_latent_map({}, 3, said(remedy, "leave out --latents", False)) is None),
    Value(M, "the network makes {} channels, which", lambda _: find_latent_map({}, 4, False),
          lambda remedy, _: find_latent_map({}, 4, said(remedy, "--latents for a VAE's latents", True))),
    Value(M, "the file says that its network", lambda _: find_latent_map({"encoder": PICTURES}, 3, True),
          lambda remedy, _: find_latent_map({"encoder": PICTURES}, 3, said(remedy, "leave out --latents", False)) is None),
    Value(M, "the file's encoder '{}'", lambda _: find_latent_map({"encoder": {"class_name": "other"}}, 3, False),
          lambda remedy, _: find_latent_map({"encoder": {"class_name": found(r"a file with (\S+) or", remedy)}}, 3, False) is None),
    Value("uni_instruct/class_map.py", "{} has the classes", lambda _: match_classes(("a", "b"), ("a", "c"), "one", "the other"),
          lambda remedy, _: match_classes(("a", "b"), said(remedy, "in any order", ("b", "a")), "one", "the other")),
]  # fmt: skip
