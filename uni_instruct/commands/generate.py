"""uni-instruct generate: images of seeds, as a folder, an npz or a zip."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.errors import RequestError
from uni_instruct.files import atomic_file
from uni_instruct.generate import generate as generate_images
from uni_instruct.generate import resolve_class_ids
from uni_instruct.images import contact_sheet, encode
from uni_instruct.latents import parse_seeds
from uni_instruct.progress import progress
from uni_instruct.samples import SampleRequest, is_finished, open_run

BATCH = 64
# More would be a picture that few programs open.
GRID_IMAGES = 1024


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle")
@click.option("--seeds", "seeds_text", required=True, help="One image each: 7, 0-63 or 1,5,10-12.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A file that ends in .npz or .zip, else a folder of PNGs named by seed.",
)
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Class name or id: one for all seeds, or repeated, one for each. [default: each seed draws its own]",
)
@click.option("--engine", "kind", help="onnx or torch. [default: the fastest that was exported]")
@click.option("--batch", type=click.IntRange(1, 4096), default=BATCH, help="Images at once.")
@click.option(
    "--grid", "grid_path", type=click.Path(path_type=Path), help=f"Also write a PNG of the first {GRID_IMAGES} images."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def generate(
    bundle: str,
    seeds_text: str,
    out: Path,
    classes: tuple[str, ...],
    kind: str | None,
    batch: int,
    grid_path: Path | None,
    as_json: bool,
) -> None:
    """Make the images of seeds. One seed is one image, whatever the engine, the batch or the machine.

    Interrupted, the same command goes on where it was. An --out that holds something else is never overwritten.

    Example: uni-instruct generate runs/digits/generator --seeds 0-63 --out samples --grid samples.png
    """
    seeds = parse_seeds(seeds_text)
    _check_grid(grid_path)
    opened = Bundle.open(bundle)
    class_ids = resolve_class_ids(opened.spec, seeds, classes)
    engine = open_engine(opened, kind)
    request = SampleRequest(bundle=opened, engine=engine.name, seeds=seeds, class_ids=class_ids, batch=batch)
    already = is_finished(request, out)
    images = None
    if already and grid_path:
        labels = None if class_ids is None else class_ids[:GRID_IMAGES]
        images = generate_images(engine, seeds[:GRID_IMAGES], labels, batch)
    if not already:
        with open_run(request, out) as run:
            with progress("generate", len(seeds), "images", done=run.done) as bar:
                run.fill(engine, bar)
            images = run.first(GRID_IMAGES) if grid_path else None
            run.finish()
    if grid_path and images is not None:
        _write_grid(images, grid_path)
    _report(request.facts() | {"out": str(out), "already": already}, as_json)


def _check_grid(path: Path | None) -> None:
    if path is not None and path.suffix.lower() != ".png":
        raise RequestError(f"--grid {path} is not the name of a PNG", remedy="give a file such as grid.png", param="grid")


def _write_grid(images: np.ndarray, path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(encode(contact_sheet(images)))


def _report(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        verb = "was complete" if facts["already"] else "written"
        print(f"{facts['out']} {verb}: {facts['images']} images of {facts['generator']} by {facts['engine']}")
