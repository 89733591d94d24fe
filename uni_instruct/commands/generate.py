"""uni-instruct generate: images of seeds, as a folder, an npz or a zip."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.engine import EngineId, open_engine, select_engine
from uni_instruct.errors import RequestError
from uni_instruct.files import atomic_file
from uni_instruct.generate import by_class, generate_images, resolve_class_ids
from uni_instruct.images import contact_sheet, encode
from uni_instruct.noise import parse_seeds
from uni_instruct.progress import progress
from uni_instruct.sampling import SampleRequest, is_finished, noted_engine, open_run, read_samples, remove_leftovers
from uni_instruct.spec import ModelSpec

BATCH = 64
UNIFORM, DATA = "uniform", "data"
# More would be a picture that few programs open.
GRID_IMAGES = 1024


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle")
@click.option("--seeds", "seeds_text", required=True, help="One image each: 7, 0-63 or 1,5,10-12.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A file that ends in .npz or .zip, else a folder of PNGs named by seed. Not needed with --grid. Latents go to .npz.",
)
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Class name or id: one for all seeds, or repeated, one for each. [default: each seed draws its own]",
)
@click.option(
    "--by-class",
    "by_classes",
    is_flag=True,
    help="The classes in equal shares of the seeds, one after the other: a row of --grid each.",
)
@click.option(
    "--classes",
    "shares",
    type=click.Choice([UNIFORM, DATA]),
    help="How often the seeds draw each class: all alike, or as in the data of its training. [default: uniform]",
)
@click.option("--engine", help="Engine id, as onnx-fp32, or a runtime, as onnx. [default: the fastest here]")
@click.option("--device", help="Where it runs: cpu, cuda or cuda:1. [default: a GPU where the engine can use one]")
@click.option("--batch", type=click.IntRange(1, 4096), default=BATCH, help="Images at once.")
@click.option(
    "--grid", "grid_path", type=click.Path(path_type=Path), help=f"Also write a PNG of the first {GRID_IMAGES} images."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def generate(
    bundle: str,
    seeds_text: str,
    out: Path | None,
    classes: tuple[str, ...],
    by_classes: bool,
    shares: str | None,
    engine: str | None,
    device: str | None,
    batch: int,
    grid_path: Path | None,
    as_json: bool,
) -> None:
    """Make the images of seeds. One seed is one image, whatever the engine, the batch or the machine.

    Interrupted, the same command goes on where it was. An --out that holds something else is never overwritten.

    Example: uni-instruct generate digits --seeds 0-159 --by-class --out samples --grid samples.png
    """
    seeds = parse_seeds(seeds_text)
    _check_paths(out, grid_path, len(seeds))
    opened = Bundle.open(bundle)
    if grid_path:
        opened.check_makes_pictures()
    if by_classes and classes:
        raise RequestError("--class and --by-class both say which classes", remedy="leave one out", param="by_class")
    if shares and (by_classes or classes):
        raise RequestError("--classes says how seeds draw classes, and they are given", remedy="leave one out", param="classes")
    class_ids = resolve_class_ids(
        opened.spec, seeds, by_class(opened.spec, seeds) if by_classes else classes, _shares(opened.spec, shares)
    )
    engine_id = _engine_id(opened, engine, out, device)
    request = SampleRequest(bundle=opened, engine=engine_id, seeds=seeds, class_ids=class_ids, batch=batch)
    already = out is not None and _write_set(request, out, device)
    if grid_path:
        if out is None:
            images = generate_images(open_engine(opened, engine_id, device=device), seeds, class_ids, batch)
        else:
            images = read_samples(out, GRID_IMAGES).images
        _write_grid(images, grid_path, len(seeds) // opened.spec.num_classes if by_classes else None)
    how = shares or (UNIFORM if opened.spec.num_classes and not by_classes and not classes else None)
    _report(request.facts() | {"out": str(out or grid_path), "already": already, "classes": how}, as_json)


def _shares(spec: ModelSpec, wanted: str | None) -> np.ndarray | None:
    """How often each class is to be drawn, None for all alike. Raises RequestError where the bundle does not say it."""
    if wanted and not spec.num_classes:
        raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave --classes out", param="classes")
    if wanted != DATA:
        return None
    given = spec.provenance.get("class_counts")
    counts = [count for count in given if type(count) is int and count >= 0] if isinstance(given, list | tuple) else []
    if len(counts) != spec.num_classes or not sum(counts):
        raise RequestError(
            f"generator '{spec.name}' does not say how many images of each class it was trained on",
            remedy="use --classes uniform, or give the classes with --class",
            param="classes",
        )
    return np.array(counts)


def _engine_id(bundle: Bundle, wanted: str | None, out: Path | None, device: str | None) -> str:
    """The engine to use. A set that stands at `out`, or was begun, keeps its own, unless another is asked for."""
    noted = noted_engine(out) if out is not None else None
    if noted and (wanted is None or wanted in (noted, EngineId.parse(noted).runtime)):
        return noted
    return str(select_engine(bundle, wanted, device).engine_id)


def _write_set(request: SampleRequest, out: Path, device: str | None) -> bool:
    """Writes the set, or what an interrupted run left to do of it; True where it was complete already."""
    if is_finished(request, out):
        remove_leftovers(request, out)
        return True
    with open_run(request, out) as run:
        if run.done < len(request.seeds):
            engine = open_engine(request.bundle, request.engine, device=device)
            with progress("generate", len(request.seeds), "images", done=run.done) as bar:
                run.fill(engine, bar)
        run.finish()
    return False


def _check_paths(out: Path | None, grid: Path | None, count: int) -> None:
    if grid is not None and grid.suffix.lower() != ".png":
        raise RequestError(f"--grid {grid} is not the name of a PNG", remedy="give a file such as grid.png", param="grid")
    if out is None and grid is None:
        raise click.UsageError("Missing option '--out', or '--grid' for a picture alone.")
    if out is None and count > GRID_IMAGES:
        raise RequestError(
            f"a picture alone holds {GRID_IMAGES} images, not {count}", remedy="give --out for the rest", param="out"
        )


def _write_grid(images: np.ndarray, path: Path, columns: int | None) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(encode(contact_sheet(images, columns)))


def _report(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        verb = "was complete" if facts["already"] else "written"
        classes = f", classes {facts['classes']}" if facts["classes"] == DATA else ""
        print(f"{facts['out']} {verb}: {facts['images']} images of {facts['generator']} by {facts['engine']}{classes}")
