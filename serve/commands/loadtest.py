"""`uni-instruct loadtest`: send requests at a steady rate, and compare every image with the one that is made here."""

import json
import os
import time
from collections.abc import Mapping

import rich_click as click
from rich.console import Console
from rich.table import Table

from uni_instruct.bundle import Bundle, shipped_generators
from uni_instruct.commands.option_types import FiniteRange
from uni_instruct.engine import open_engine
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.serve.api_keys import read_keys
from uni_instruct.serve.load_test import TargetServer, apply_load, count_wrong, summary
from uni_instruct.serve.settings import variable
from uni_instruct.system.progress import progress


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("url")
@click.option("--model", default=None, help="Name of the model to request.  [default: the server's first]")
@click.option(
    "--bundle",
    default=None,
    help="Local bundle of the same model, to compare images with.  [default: the shipped generator of that name]",
)
@click.option("--rate", default=10.0, type=FiniteRange(0, 1e6, min_open=True), help="Requests per second.")
@click.option("--seconds", default=10.0, type=FiniteRange(0, 86_400, min_open=True), help="Duration in seconds.")
@click.option("--images", default=1, type=click.IntRange(1, 64), help="Images per request.")
@click.option(
    "--tolerance", default=1, type=click.IntRange(0, 255), help="Largest allowed difference of a pixel's value (0 to 255)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def loadtest(
    url: str,
    model: str | None,
    bundle: str | None,
    rate: float,
    seconds: float,
    images: int,
    tolerance: int,
    as_json: bool,
) -> None:
    """Load the server at URL, and compare every image that it returns with the one made here from the same seed.

    Requests are sent at fixed times, even if earlier ones are not answered yet, and latencies are measured from those
    times: if the server cannot keep up, the latencies show it. The API key is read as 'serve' reads it, from
    UNI_INSTRUCT_API_KEY or the file named by UNI_INSTRUCT_API_KEY_FILE; of several keys the first is used. The exit code is
    1 if an image is wrong, or if no image came back.

    Example: uni-instruct loadtest http://127.0.0.1:3000 --rate 200 --seconds 30
    """
    keys = read_keys(os.environ.get(variable("api_key")) or None, os.environ.get(variable("api_key_file")) or None)
    target = TargetServer(url, keys[0] if keys else None)
    facts = target.facts(model)
    name = model or facts["name"]
    engine = open_engine(_bundle_here(bundle, facts), facts["engine"])
    start = time.perf_counter()
    answers = apply_load(target, name, rate, seconds, images, progress)
    report = summary(answers, time.perf_counter() - start)
    report = {"model": name, "engine": facts["engine"], "rate": rate, **report}
    report["wrong_images"] = count_wrong(answers, engine, tolerance, progress)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show(report)
    if report["wrong_images"]:
        raise UniInstructError(
            f"{report['wrong_images']} images differ from those made here (--tolerance {tolerance})",
            remedy="serve with --engine torch, or export the engine again",
        )
    if not report["images"]:
        raise UniInstructError("no image came back", remedy="the statuses and the server's log say why")


def _bundle_here(bundle: str | None, facts: Mapping[str, str]) -> Bundle:
    """Open the bundle to compare images with. Raises RequestError if there is none with the weights of the server."""
    name = facts["name"]
    # A name that the server sent is only looked up among the shipped generators. Elsewhere it might open a folder or start a
    # download.
    if bundle is None and name not in shipped_generators():
        raise RequestError(
            f"{name[:80]} is not a shipped generator, so there is nothing to compare its images with",
            remedy="give --bundle FOLDER with the same weights",
            param="bundle",
        )
    opened = Bundle.open(bundle or name)
    if opened.weights_sha256 != facts["weights_sha256"]:
        raise RequestError(
            f"{opened.path} has other weights than {name[:80]} on the server",
            remedy="give --bundle FOLDER with the weights that the server has",
            param="bundle",
        )
    return opened


def _show(report: dict[str, object]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in report.items():
        shown = ", ".join(f"{status}: {count}" for status, count in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)
