"""uni-instruct data: data sets in, EDM's zip out."""

import json
from pathlib import Path

import rich_click as click

from uni_instruct.data import Dataset, open_dataset, write_zip
from uni_instruct.errors import RequestError
from uni_instruct.files import sha256
from uni_instruct.progress import progress


@click.group()
def data() -> None:
    """Prepare a data set.

    Example: uni-instruct data prepare digits --out digits.zip
    """


@data.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The zip to write; replaced if there.")
@click.option("--resolution", type=int, help="Centre-crop to a square and resize to this many pixels.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def prepare(source: str, out: Path, resolution: int | None, as_json: bool) -> None:
    """Write SOURCE as a zip that `train`, `evaluate` and EDM's tools read.

    SOURCE is digits, fashion-mnist or fashion-mnist-test; a folder of images (classes are its sub-folders), a zip, an
    .npz with arr_0, a folder of IDX files.

    Example: uni-instruct data prepare photos/ --resolution 64 --out photos.zip
    """
    if out.suffix.lower() != ".zip" or out.is_dir():
        raise RequestError(f"--out {out} is not the name of a zip", remedy="give a file such as data.zip", param="out")
    dataset = open_dataset(source, resolution)
    with progress("prepare", len(dataset), "images") as bar:
        write_zip(dataset, out, bar)
    click.echo(json.dumps(_facts(dataset, out), indent=2) if as_json else f"wrote {out}: {describe(dataset)}")


def describe(dataset: Dataset) -> str:
    """A data set in one line."""
    channels, height, width = dataset.image_shape
    colours = {1: "grey", 3: "colour"}[channels]
    classes = f"{dataset.num_classes} classes" if dataset.num_classes else "no classes"
    return f"{dataset.name}, {len(dataset)} {colours} images of {width}x{height}, {classes}, licence {dataset.licence}"


def _facts(dataset: Dataset, out: Path) -> dict[str, object]:
    return {
        "path": str(out),
        "sha256": sha256(out),
        "name": dataset.name,
        "images": len(dataset),
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "licence": dataset.licence,
        "source": dataset.source,
    }
