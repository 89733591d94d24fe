"""`uni-instruct serve`: checks the request, runs BentoML as a child process, and stops everything that it has started."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType

import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.engine import select_engine
from uni_instruct.errors import MissingExtraError
from uni_instruct.ports import free_address


class _StopRequested(Exception):
    """Ctrl-C, or SIGTERM."""


@click.command()
@click.argument("bundle", required=False)
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every interface.")
@click.option("--port", default=3000, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--engine", default=None, help="Engine id, as onnx-fp32, or a runtime, as onnx.  [default: the fastest here]")
@click.option("--device", help="Where it runs: cpu, cuda or cuda:1.  [default: a GPU where the engine can use one]")
@click.option("--workers", default=1, type=click.IntRange(1, 64), help="Processes. The demo needs 1.")
def serve(bundle: str | None, host: str, port: int, engine: str | None, device: str | None, workers: int) -> None:
    """Serve BUNDLE over HTTP, with a web demo under /ui.

    A folder, hf://owner/name, or the name of a shipped generator; without it UNI_INSTRUCT_BUNDLE, else the best that ships.
    Ctrl-C stops it. docs/serving.md has the API, the metrics and the settings.

    Example: uni-instruct serve runs/digits/generator --port 3000
    """
    for package in ("bentoml", "prometheus_client", "psutil", "pydantic", "starlette"):
        if find_spec(package) is None:
            raise MissingExtraError(package, extra="serve")
    from uni_instruct.serve.process import Server
    from uni_instruct.serve.settings import PREFIX, settings_from_environment

    # Everything that can be wrong is found here, in a second; a worker would say it in the middle of its own log.
    settings = settings_from_environment()
    opened = Bundle.open(bundle or settings.bundle)
    wanted, place = engine or settings.engine, device or settings.device
    _check(opened, wanted, place)
    address = free_address(host, port)
    environment = {
        **os.environ,
        "BENTOML_DO_NOT_TRACK": "true",
        "GRADIO_ANALYTICS_ENABLED": "False",
        f"{PREFIX}BUNDLE": str(opened.path.resolve()),
        f"{PREFIX}ENGINE": wanted or "",
        f"{PREFIX}DEVICE": place or "",
        f"{PREFIX}WORKERS": str(workers),
    }
    with tempfile.TemporaryDirectory(prefix="uni-instruct-serve-") as folder, _signals(_request_stop):
        # BentoML keeps its files in that folder, and imports nothing that happens to lie in the user's.
        environment.setdefault("BENTOML_HOME", folder)
        server = Server(address, port, environment, folder)
        try:
            server.wait_until_ready()
            _announce(opened.spec.name, server.url, workers)
            server.wait()
        except _StopRequested:
            click.echo("\nstopping", err=True)
        finally:
            # A second Ctrl-C would end this process and leave the server running.
            with _signals(signal.SIG_IGN):
                server.stop()


def _check(bundle: Bundle, engine: str | None, device: str | None) -> None:
    """Raises RequestError for latents and for an engine or device that cannot be had, BundleError for damaged files."""
    bundle.check_makes_pictures()
    if stored := bundle.engines().get(select_engine(bundle, engine, device).engine_id):
        stored.file()


def _announce(name: str, url: str, workers: int) -> None:
    click.echo(f"serving on {url}  (Ctrl-C stops)")
    click.echo(f"generator  {name}")
    demo = f"{url}/ui" if workers == 1 else "off: its state lives in one process; use --workers 1"
    click.echo(f"demo       {demo}")
    click.echo(f"API        {url}/docs")


def _request_stop(number: int, frame: FrameType | None) -> None:
    raise _StopRequested


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Within the block, the handler takes Ctrl-C, SIGTERM, and the end of the terminal (SIGHUP)."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` ignores it on purpose
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
