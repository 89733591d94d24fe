# ruff: noqa: E501
"""Wrong calls from Python and over HTTP, and how each remedy is followed."""

import json
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from builders.data_sets import grey_zip, png, zip_of
from builders.remedies import first_choice
from uni_instruct.class_mixture import ClassMixture
from uni_instruct.data import open_dataset
from uni_instruct.generate import input_batches, mix_classes, resolve_class_ids
from uni_instruct.images import checked_images, encode
from uni_instruct.noise import checked_inputs, checked_seeds
from uni_instruct.serve.routes.schema import GenerateRequest, parse_request, resolve
from uni_instruct.spec import ModelSpec

SPEC = ModelSpec(name="tiny", noise_shape=(1, 8, 8), num_classes=3, class_names=("ape", "bee", "cat"))
PLAIN = ModelSpec(name="plain", noise_shape=(1, 8, 8))
NOISE = np.zeros((2, 1, 8, 8), np.float32)


class Value(NamedTuple):
    """Where its message is made, a wrong call with a folder to work in, and one that follows the remedy."""

    path: str
    message: str
    wrong: Callable[[Path], object]
    follow: Callable[[str, Path], object]


def found(pattern: str, remedy: str) -> str:
    match = re.search(pattern, remedy)
    assert match, remedy
    return match[1]


def folder(tmp: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = tmp / "x" / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp / "x"


def read(path: Path | str, **form: int) -> np.ndarray:
    dataset = open_dataset(path, **form)
    return dataset.stored(range(len(dataset)))


def without_file(tmp: Path, name: str, remedy: str, word: str) -> np.ndarray:
    assert word in remedy, remedy
    (tmp / "x" / name).unlink()
    return read(tmp / "x")


def request(**body: object) -> object:
    return resolve(GenerateRequest(**body), SPEC, 4)  # type: ignore[arg-type]


def labelled(tmp: Path, meta: object) -> np.ndarray:
    return read(zip_of(tmp / "x.zip", {"a.png": GREY, "b.png": GREY}, meta))


GREY, WIDE = png(np.zeros((4, 4), np.uint8)), png(np.zeros((4, 8), np.uint8))
COLOUR = png(np.zeros((4, 4, 3), np.uint8))
N, G, S, L, F = (
    "uni_instruct/noise.py",
    "uni_instruct/generate.py",
    "serve/routes/schema.py",
    "uni_instruct/data/labels.py",
    "uni_instruct/data/image_files.py",
)
VALUES = [
    Value(N, "seeds {} are not a list", lambda _: checked_seeds("7"),  # type: ignore[arg-type]
          lambda remedy, _: checked_seeds(json.loads(found(r"such as (\[.*?\])", remedy)))),
    Value(N, "generator '{}' has {} classes, but no class ids", lambda _: checked_inputs(SPEC, NOISE, None),
          lambda remedy, _: checked_inputs(SPEC, NOISE, [0] * (len(NOISE) if "one for each image" in remedy else 0))),
    Value(N, "generator '{}' has no classes", lambda _: checked_inputs(PLAIN, NOISE, [0, 1]),
          lambda remedy, _: checked_inputs(PLAIN, NOISE, None if "leave the class out" in remedy else [0])),
    Value(N, "class ids are {} {}, not integers", lambda _: checked_inputs(SPEC, NOISE, [1]),
          lambda remedy, _: checked_inputs(SPEC, NOISE, [1] * (len(NOISE) if "for each image" in remedy else 1))),
    Value(N, "shares are {} {}, not numbers", lambda _: checked_inputs(SPEC, NOISE, ClassMixture([0, 0], [1, 1], [0.5])),  # type: ignore[arg-type]
          lambda remedy, _: checked_inputs(SPEC, NOISE, ClassMixture([0, 0], [1, 1], [float(found(r"from (\d)", remedy))] * len(NOISE)))),  # type: ignore[arg-type]
    Value(N, "share {} is outside", lambda _: mix_classes(SPEC, 0, 1, 1.5),
          lambda remedy, _: mix_classes(SPEC, 0, 1, float(found(r"(\d\.\d) for half", remedy)))),
    Value(N, "noise is {}, not float32", lambda _: checked_inputs(SPEC, NOISE.astype("f8"), [1, 1]),
          lambda remedy, _: checked_inputs(SPEC, NOISE.astype("f8").astype(found(r"astype\('(\w+)'\)", remedy)), [1, 1])),
    Value(N, "{} cannot be read as an array", lambda _: checked_inputs(SPEC, [[1], [1, 2]], [1, 1]),  # type: ignore[list-item]
          lambda remedy, _: checked_inputs(SPEC, np.array(NOISE) if "NumPy array" in remedy else [], [1, 1])),
    Value(G, "batch {} is not a positive", lambda _: input_batches(SPEC, [1], batch=0),
          lambda remedy, _: input_batches(SPEC, [1], batch=int(found(r"such as (\d+)", remedy)))),
    Value(G, "classes {} are not a list", lambda _: resolve_class_ids(SPEC, [1], {2}),  # type: ignore[arg-type]
          lambda remedy, _: resolve_class_ids(SPEC, [1], [json.loads(found(r"such as \[(\d)\]", remedy)) - 1])),
    Value(G, "class {} is neither", lambda _: resolve_class_ids(SPEC, [1], [1.5]),  # type: ignore[list-item]
          lambda remedy, _: resolve_class_ids(SPEC, [1], [SPEC.class_names[0] if "lists the classes" in remedy else ""])),
    Value("uni_instruct/images.py", "image format '{}'", lambda _: encode(np.zeros((4, 4, 1), np.uint8), "tga"),
          lambda remedy, _: encode(np.zeros((4, 4, 1), np.uint8), first_choice(remedy))),
    Value("uni_instruct/images.py", "{}, not uint8", lambda _: checked_images(np.zeros((2, 4, 4, 1))),
          lambda remedy, _: checked_images(np.zeros((2, 4, 4, 1)).astype(np.uint8))),
    Value(S, "both seeds and num_images", lambda _: request(seeds=[1], num_images=2),
          lambda remedy, _: request(seeds=[1]) if "give one of them" in remedy else None),
    Value(S, "both class_ids and classes", lambda _: request(class_ids=[1], classes=["ape"]),
          lambda remedy, _: request(classes=["ape"]) if "give one of them" in remedy else None),
    Value(S, "the list of classes is empty", lambda _: request(classes=[]),
          lambda remedy, _: request() if "leave it out" in remedy else None),
    Value(S, "{} images were asked for", lambda _: request(num_images=9),
          lambda remedy, _: request(num_images=int(found(r"1 to (\d+)", remedy)))),
    Value(S, "{} images do not fit into one", lambda _: request(num_images=2, format="png"),
          lambda remedy, _: request(num_images=2, format="png", **json.loads(f"{{{found(r'set (.*?),', remedy)}}}"))),
    Value(S, "a grid is a picture", lambda _: request(num_images=2, format="npz", grid=True),
          lambda remedy, _: request(num_images=2, format=found(r"the format (\w+)", remedy), grid=True)),
    Value(S, "the body is not JSON", lambda _: parse_request(b"{"),
          lambda remedy, _: parse_request(found(r"such as (\{.*\})", remedy).encode())),
    Value(S, "the body is {}, not an object", lambda _: parse_request(b"[1]"),
          lambda remedy, _: parse_request(found(r"such as (\{.*\})", remedy).encode())),
    Value(S, "field '{}' is unknown", lambda _: parse_request(b'{"num_image": 1}'),
          lambda remedy, _: parse_request(json.dumps({get_close_matches("num_image", re.findall(r"\w+", remedy))[0]: 1}).encode())),
    Value(S, "{} is {}", lambda _: parse_request(b'{"seeds": ["a"]}'),
          lambda remedy, _: parse_request(f'{{"seeds": {found(r"such as (.*)$", remedy)}}}'.encode())),
    Value(F, "{} cannot be read: {}", lambda tmp: read(folder(tmp, a_png=GREY, b_png=b"text")),
          lambda remedy, tmp: without_file(tmp, "b.png", remedy, "remove that file")),
    Value(F, "{} is {}, other images are {}", lambda tmp: read(folder(tmp, a_png=GREY, b_png=WIDE)),
          lambda remedy, tmp: read(tmp / "x", **{found(r"prepare --(\w+)'", remedy): 4})),
    Value("uni_instruct/data/class_folders.py", "{} has images both in", lambda tmp: read(folder(tmp, a_png=GREY, c__b_png=GREY)),
          lambda remedy, tmp: without_file(tmp, "a.png", remedy, "every image into a class folder")),
    Value("uni_instruct/data/class_folders.py", "{} has folders {}", lambda tmp: read(folder(tmp, train__a_png=GREY, test__b_png=GREY)),
          lambda remedy, tmp: read(found(r"give one of them \((.*?)\)", remedy))),
    Value("uni_instruct/data/class_folders.py", "class folder {} in {} has no images",
          lambda tmp: read(folder(tmp, a__1_png=GREY, b__2_txt=b"x")),
          lambda remedy, tmp: read(folder(tmp, b__2_png=GREY) if "add images" in remedy else tmp)),
    Value("uni_instruct/data/file_kinds.py", "{} has no images{}", lambda tmp: read(folder(tmp, a_txt=b"x")),
          lambda remedy, tmp: read(folder(tmp, a_png=GREY) if "give a folder of images" in remedy else tmp)),
    Value(L, "{} in {} is not a JSON object", lambda tmp: labelled(tmp, []),
          lambda remedy, tmp: labelled(tmp, {"labels": [["a.png", 0], ["b.png", 1]]} if "[file, class]" in remedy else None)),
    Value(L, "labels in {} of {} are not a list", lambda tmp: labelled(tmp, {"labels": 3}),
          lambda remedy, tmp: labelled(tmp, {"labels": json.loads(found(r"or (null)", remedy))})),
    Value(L, "num_classes {} in {} of {}", lambda tmp: labelled(tmp, {"labels": [["a.png", 0], ["b.png", 1]], "num_classes": "x"}),
          lambda remedy, tmp: labelled(tmp, {"labels": [["a.png", 0], ["b.png", 1]]} if "leave it out" in remedy else {"labels": 3})),
    Value("uni_instruct/data/sources.py", "resolution {} is out of range", lambda tmp: read(grey_zip(tmp / "a.zip", [1]), resolution=0),
          lambda remedy, tmp: read(tmp / "a.zip", resolution=int(found(r"give (\d+) to", remedy)))),
    Value("uni_instruct/data/sources.py", "num_classes {} is out of range",
          lambda tmp: read(grey_zip(tmp / "a.zip", [1], [0]), num_classes=0),
          lambda remedy, tmp: read(tmp / "a.zip", num_classes=int(found(r"give (\d+) to", remedy)))),
    Value("uni_instruct/data/sources.py", "channels {} is neither", lambda tmp: read(grey_zip(tmp / "a.zip", [1]), channels=2),
          lambda remedy, tmp: read(tmp / "a.zip", channels=int(found(r"or (\d) for colour", remedy)))),
]  # fmt: skip
