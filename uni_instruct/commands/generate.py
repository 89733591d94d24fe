"""`uni-instruct generate`: make the images of seeds, as a folder of PNGs or tar shards, an npz or a zip."""

import json
from pathlib import Path

import numpy as np
import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.commands.worker_options import ray_option, worker_options_of, workers_option
from uni_instruct.engine import EngineId, open_engine, select_engine
from uni_instruct.errors import RequestError
from uni_instruct.generate import by_class, generate_images, resolve_class_ids
from uni_instruct.images import contact_sheet, encode
from uni_instruct.noise import parse_seeds
from uni_instruct.sampling import (
    SampleRequest,
    SampleRun,
    is_finished,
    open_run,
    read_samples,
    recorded_engine,
    remove_leftovers,
)
from uni_instruct.sampling.pool import ImageJob
from uni_instruct.sampling.shards import WHOLE, Part
from uni_instruct.sampling.workers import WorkerOptions
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import atomic_file
from uni_instruct.system.progress import progress

BATCH = 64
UNIFORM, DATA = "uniform", "data"
# With more images, few programs could open the picture.
GRID_IMAGES = 1024


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle")
@click.option("--seeds", "seeds_text", required=True, help="Seeds, one for each image: 7, 0-63 or 1,5,10-12.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A file that ends in .npz or .zip, a folder of tar shards that ends in .wds, else a folder of PNGs named by seed. "
    "Not needed with --grid. Latents go to .npz or .wds.",
)
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Class name or id: one for all seeds, or repeated, one for each. [default: drawn from each seed]",
)
@click.option(
    "--by-class",
    "by_classes",
    is_flag=True,
    help="Divide the seeds equally among the classes, in order. --grid then has one row for each class.",
)
@click.option(
    "--classes",
    "shares",
    type=click.Choice([UNIFORM, DATA]),
    help="How classes are drawn: uniformly, or with the frequencies of the training data (data). [default: uniform]",
)
@click.option(
    "--steps",
    type=click.IntRange(2, 1000),
    help="Sampling steps of a teacher. N steps take 2N - 1 network evaluations. [default: the teacher's own]",
)
@click.option("--engine", help="Engine id, as onnx-fp32, or a runtime, as onnx. [default: the fastest on this machine]")
@click.option(
    "--device", help="Device of the engine: cpu, cuda or cuda:1. [default: a GPU if the engine can use one, else the CPU]"
)
@click.option("--batch", type=click.IntRange(1, 4096), default=BATCH, help="Images at once.")
@click.option(
    "--grid", "grid_path", type=click.Path(path_type=Path), help=f"Also write a PNG of the first {GRID_IMAGES} images."
)
@workers_option
@ray_option
@click.option(
    "--shard", "part_text", metavar="K/N", help="Make only part K of N, for batch systems. All jobs use the same --out."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def generate(
    bundle: str,
    seeds_text: str,
    out: Path | None,
    classes: tuple[str, ...],
    by_classes: bool,
    shares: str | None,
    steps: int | None,
    engine: str | None,
    device: str | None,
    batch: int,
    grid_path: Path | None,
    workers: int | None,
    ray_address: str | None,
    part_text: str | None,
    as_json: bool,
) -> None:
    """Make the images of seeds. A seed makes the same image with any engine, batch size or machine, up to rounding.

    If it is interrupted, run the same command again to continue. An --out with other content is never overwritten.

    Example: uni-instruct generate digits --seeds 0-159 --by-class --out samples --grid samples.png
    """
    seeds, part = parse_seeds(seeds_text), Part.parse(part_text) if part_text is not None else None
    worker_options = worker_options_of(workers, ray_address, device)
    _check_paths(out, grid_path, len(seeds))
    _check_sharing(out, grid_path, worker_options, part)
    opened = _opened(bundle, steps, pictures=grid_path is not None)
    _check_classes(by_classes, classes, shares)
    class_ids = resolve_class_ids(
        opened.spec, seeds, by_class(opened.spec, seeds) if by_classes else classes, _shares(opened.spec, shares)
    )
    engine_id = _engine_id(opened, engine, out, device)
    request = SampleRequest(bundle=opened, engine=engine_id, seeds=seeds, class_ids=class_ids, batch=batch)
    already = out is not None and _write_set(request, out, worker_options, part, device)
    if grid_path:
        if out is None:
            images = generate_images(open_engine(opened, engine_id, device=device), seeds, class_ids, batch)
        else:
            images = read_samples(out, GRID_IMAGES).images
        _write_grid(images, grid_path, len(seeds) // opened.spec.num_classes if by_classes else None)
    how = shares or (UNIFORM if opened.spec.num_classes and not by_classes and not classes else None)
    facts = request.facts() | {"out": str(out or grid_path), "already": already, "classes": how, "shard": part_text}
    _report(facts | {"complete": out is None or is_finished(request, out)}, as_json)


def _opened(bundle: str, steps: int | None, *, pictures: bool) -> Bundle:
    opened = Bundle.open(bundle)
    opened = opened if steps is None else opened.with_steps(steps)
    if pictures:
        opened.check_makes_pictures()
    return opened


def _check_sharing(out: Path | None, grid_path: Path | None, worker_options: WorkerOptions, part: Part | None) -> None:
    if out is None and (part or worker_options.wanted):
        raise RequestError("--workers, --ray and --shard need an output", remedy="give --out", param="out")
    if part and grid_path:
        raise RequestError(
            "--grid cannot be combined with --shard",
            remedy="leave --grid out, and give it when all shards are done",
            param="grid",
        )


def _check_classes(by_classes: bool, classes: tuple[str, ...], shares: str | None) -> None:
    if by_classes and classes:
        raise RequestError("--class and --by-class both say which classes", remedy="leave one out", param="by_class")
    if shares and (by_classes or classes):
        raise RequestError(
            "--classes draws the classes from the seeds, but --class or --by-class gives them",
            remedy="leave one out",
            param="classes",
        )


def _shares(spec: ModelSpec, wanted: str | None) -> np.ndarray | None:
    """The frequencies of classes for --classes data, from the bundle; None for uniform ones.

    Raises RequestError if the bundle does not record them, or has no classes.
    """
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
    """The engine to use. A set that exists at `out` or was started keeps its engine, unless another one is requested."""
    noted = recorded_engine(out) if out is not None else None
    if noted and (wanted is None or wanted in (noted, EngineId.parse(noted).runtime)):
        return noted
    return str(select_engine(bundle, wanted, device).engine_id)


def _write_set(request: SampleRequest, out: Path, worker_options: WorkerOptions, part: Part | None, device: str | None) -> bool:
    """Write the set, or complete an interrupted one; return whether it was complete already.

    With a part, make its images, and write the set if the images of all other parts exist.
    """
    if is_finished(request, out):
        remove_leftovers(request, out)
        return True
    with open_run(request, out, shared=part is not None, part=part or WHOLE) as run:
        if run.done < run.count:
            _fill(run, worker_options, device, "generate" if part is None else f"generate {part.number}/{part.count}")
        if run.is_complete:
            run.finish()
    return False


def _fill(run: SampleRun, worker_options: WorkerOptions, device: str | None, label: str) -> None:
    request = run.request
    # The engine is opened before the progress bar starts, so that an error is a single line.
    engine = None if worker_options.wanted else open_engine(request.bundle, request.engine, device=device)
    with progress(label, run.count, "images", done=run.done) as bar:
        if engine is not None:
            run.fill(engine, bar)
            return
        job = ImageJob(
            bundle=request.bundle.path, engine=request.engine, batch=request.batch, steps=request.spec.steps, device=device
        )
        with worker_options.pool(job) as pool:
            run.fill_with_pool(pool, bar)


def _check_paths(out: Path | None, grid: Path | None, count: int) -> None:
    if grid is not None and grid.suffix.lower() != ".png":
        raise RequestError(f"--grid {grid} is not the name of a PNG", remedy="give a file such as grid.png", param="grid")
    if out is None and grid is None:
        raise click.UsageError("Missing option '--out', or '--grid' to write only a picture.")
    if out is None and count > GRID_IMAGES:
        raise RequestError(
            f"--grid without --out holds at most {GRID_IMAGES} images, not {count}",
            remedy="give --out to write all of them",
            param="out",
        )


def _write_grid(images: np.ndarray, path: Path, columns: int | None) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(encode(contact_sheet(images, columns)))


def _report(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
    elif not facts["complete"]:
        print(f"{facts['out']}: shard {facts['shard']} is done; the set is written when all shards are done")
    else:
        verb = "was complete" if facts["already"] else "written"
        classes = f", classes {facts['classes']}" if facts["classes"] == DATA else ""
        print(f"{facts['out']} {verb}: {facts['images']} images of {facts['generator']} by {facts['engine']}{classes}")
