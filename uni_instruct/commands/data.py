"""`uni-instruct data`: convert a data set to EDM's zip, or check one for faults."""

import json
from pathlib import Path

import rich_click as click

from uni_instruct.data import Dataset, check_data, open_dataset, write_zip
from uni_instruct.data.dataset import MAX_CLASSES
from uni_instruct.data.sources import MAX_RESOLUTION
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.system.files import sha256
from uni_instruct.system.progress import progress

_COLOURS = {1: "grey", 3: "colour"}


@click.group()
def data() -> None:
    """Prepare or check a data set.

    Example: uni-instruct data prepare digits --out digits.zip
    """


@data.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The zip to write. An existing one is replaced.")
@click.option(
    "--resolution", type=click.IntRange(1, MAX_RESOLUTION), help="Centre-crop to a square and resize to this many pixels."
)
@click.option("--channels", type=click.IntRange(1, 3), help="Convert all images to grey (1) or colour (3).")
@click.option(
    "--num-classes",
    type=click.IntRange(1, MAX_CLASSES),
    help="Number of classes, if the last ones have no images.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prepare(
    source: str, out: Path, resolution: int | None, channels: int | None, num_classes: int | None, as_json: bool
) -> None:
    """Write SOURCE as a zip that `train`, `evaluate` and EDM's tools read.

    SOURCE is digits, fashion-mnist, fashion-mnist-test or emoji (or emoji:FILE for another colour font); a folder or zip of
    images (its folders are the classes) or of EDM2's latents; an .npz with arr_0; a folder of IDX files; or
    cifar-10-python.tar.gz. Several of them, separated by commas as in a.zip,b.zip, are merged into one data set.

    Example: uni-instruct data prepare photos/ --resolution 64 --out photos.zip
    """
    # Checked before the data set is opened, which may take minutes or a download.
    if out.suffix.lower() != ".zip" or out.is_dir():
        raise RequestError(f"--out {out} is not the name of a zip", remedy="give a file such as data.zip", param="out")
    dataset = open_dataset(source, resolution, num_classes, channels)
    with progress("prepare", len(dataset), "images") as bar:
        write_zip(dataset, out, bar)
    click.echo(json.dumps(_facts(dataset, out), indent=2) if as_json else f"wrote {out}: {describe(dataset)}")


@data.command()
@click.argument("source")
@click.option(
    "--resolution",
    type=click.IntRange(1, MAX_RESOLUTION),
    help="Allow different sizes: images will be resized to this many pixels.",
)
@click.option("--channels", type=click.IntRange(1, 3), help="Images will be converted to grey (1) or colour (3).")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(source: str, resolution: int | None, channels: int | None, as_json: bool) -> None:
    """Read every image and label of SOURCE and list the faulty files. The exit code is 2 if there are any.

    Example: uni-instruct data check data.zip
    """
    found = check_data(source, resolution, channels, progress)
    if as_json:
        wrong = [one._asdict() for one in found.wrong]
        facts = {"source": source, "images": found.images, "wrong": wrong, "note": found.note}
        click.echo(json.dumps(facts, indent=2))
    elif found.wrong:
        click.echo("\n".join(one.problem for one in found.wrong))
    else:
        click.echo(f"nothing is wrong: {describe(open_dataset(source, resolution, channels=channels))}")
    # Raised as an error, after the list is printed, because scripts that check before they train use the exit code.
    if found.wrong:
        # A file may be listed twice, once for its size and once for its label.
        files = len({(one.source, one.file) for one in found.wrong})
        raise FileFormatError(
            f"{source}: {files} file{'s are' if files > 1 else ' is'} wrong, {found.images} images were read",
            remedy="replace, remove or label the files that are listed",
        )


def describe(dataset: Dataset) -> str:
    """A description of the data set in one line."""
    channels, height, width = dataset.image_shape
    content = "latents" if dataset.latents else f"{_COLOURS[channels]} images"
    classes = f"{dataset.num_classes} classes" if dataset.num_classes else "no classes"
    note = f"; {dataset.note}" if dataset.note else ""
    return f"{dataset.name}, {len(dataset)} {content} of {width}x{height}, {classes}, licence {dataset.licence}{note}"


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
        "note": dataset.note,
    }
