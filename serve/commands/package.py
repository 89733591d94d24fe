"""`uni-instruct package`: pack generators as a Bento, which runs, also in a container, without torch."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import rich_click as click

from uni_instruct.errors import MissingExtraError
from uni_instruct.serve.model_sources import sources_by_name
from uni_instruct.serve.packaging.packed_service import STEPS
from uni_instruct.system.progress import progress

if TYPE_CHECKING:
    from uni_instruct.serve.packaging.bento import PackagedBento


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("names", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Archive to write.  [default: into BentoML's store]")
@click.option("--engine", default=None, help="Pack only this engine, such as onnx-fp32.  [default: all that run without torch]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def package(names: tuple[str, ...], out: Path | None, engine: str | None, as_json: bool) -> None:
    """Pack generators as a Bento: their bundles and engines, this package's wheel and pinned requirements, without torch.

    NAMES are as in 'serve': a shipped generator, a folder, hf://owner/name, or other=FOLDER. 'bentoml serve' runs the Bento,
    'bentoml containerize' builds a container image from it (docs/serving.md, "Packaging").

    Example: uni-instruct package digits mine=runs/mine/generator --out images.bento
    """
    for needed in ("bentoml", "packaging", "prometheus_client", "psutil", "pydantic", "starlette"):
        if find_spec(needed) is None:
            raise MissingExtraError(needed, extra="serve")
    with progress("packaging", STEPS, "steps") as bar:
        # Imported here, because it takes a second, in which the progress bar is shown already.
        from uni_instruct.serve.packaging.bento import package as package_generators

        made = package_generators(sources_by_name(names), out, engine, bar)
    print(json.dumps(asdict(made), indent=2) if as_json else _summary(made, out))


def _summary(made: "PackagedBento", out: Path | None) -> str:
    lines = [f"{made.tag}: {made.path}, {made.file_bytes / 1e6:.1f} MB"]
    for name, bundle in made.bundles.items():
        lines.append(f"  {name}: weights {bundle.weights_sha256[:12]}, {', '.join(bundle.engines)}")
    lines.append(f"  {made.wheel}, {len(made.requirements) - 1} pinned packages, no torch")
    taken = f"bentoml import {quote(str(out))} && " if out is not None else ""
    lines.append(f"next: {taken}bentoml serve {made.tag}, or bentoml containerize {made.tag}")
    return "\n".join(lines)
