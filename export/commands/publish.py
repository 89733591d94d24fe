"""uni-instruct publish: make a trained generator ready to ship."""

import json
from dataclasses import asdict
from pathlib import Path
from shlex import quote

import rich_click as click

from uni_instruct.bundle import WEIGHTS
from uni_instruct.export.publish import Publication
from uni_instruct.export.publish import publish as publish_generator
from uni_instruct.system.processes import sigterm_as_interrupt
from uni_instruct.system.progress import progress, silent


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source", metavar="RUN|BUNDLE")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the published bundle.")
@click.option(
    "--scores",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="File with the output of 'evaluate --json', for the card; repeatable, one file for each set of seeds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was published as JSON.")
def publish(source: str, out: Path, scores: tuple[Path, ...], as_json: bool) -> None:
    """Make a generator ready to ship: weights in half precision, engine, samples and model card.

    Weights are stored in half precision if that changes no pixel of 512 images by more than one level; else they stay float32.
    The images cover every class. For networks that take a CPU seconds per image, 16 images are compared, or one of each of 32
    classes. A teacher (RUN/teacher) is always stored in half precision, unless its weights are too large for that.
    Run the same command again with --scores to add scores to the card.

    Example: uni-instruct publish runs/digits --out digits --scores scores.json
    """
    if not as_json:
        click.echo("comparing half precision with float32, then building the engine and checking it ...", err=True)
    with sigterm_as_interrupt():
        published = publish_generator(source, out, scores, silent if as_json else progress)
    print(json.dumps(asdict(published), indent=2) if as_json else _summary(published, bool(scores)))


def _summary(published: Publication, scored: bool) -> str:
    rounding, sizes, engine = published.rounding, published.file_bytes, published.engine
    if rounding.too_large:
        found = f"stay float32: half precision cannot hold the largest numbers of {rounding.too_large}"
    elif engine is None:
        found = f"half precision changes {rounding.changed_pixels:.2%} of pixels, by up to {rounding.largest_difference} levels"
    elif rounding.precision == "fp16":
        found = f"half precision changes {rounding.changed_pixels:.2%} of pixels by 1 level, none by more"
    else:
        found = f"stay float32: half precision would change a pixel by {rounding.largest_difference} levels"
    lines = [
        f"{published.path}: {published.name}, {sum(sizes.values()) / 1e6:.1f} MB in all",
        f"  weights {sizes[WEIGHTS] / 1e6:.1f} MB, {found} ({rounding.images} images)",
    ]
    if engine is None:
        return "\n".join(lines)
    parity = engine.parity
    lines.append(
        f"  engine {engine.file}, relative L2 to torch {parity['relative_l2']:.1e}, equal pixels {parity['equal_pixels']:.3%}"
    )
    if not scored:
        command = f"uni-instruct evaluate {quote(str(published.path))} --reference DATA --json > scores.json"
        lines.append(f"next: {command}, then --scores scores.json")
    return "\n".join(lines)
