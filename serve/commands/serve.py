"""`uni-instruct serve`: checks the request, runs BentoML as a child process, and stops everything that it has started."""

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
@click.argument("names", nargs=-1)
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every interface.")
@click.option("--port", default=3000, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--engine", default=None, help="Engine id, as onnx-fp32, or a runtime, as onnx.  [default: the fastest here]")
@click.option("--workers", default=1, type=click.IntRange(1, 64), help="Processes. The demo needs 1.")
def serve(names: tuple[str, ...], host: str, port: int, engine: str | None, workers: int) -> None:
    """Serve generators over HTTP, with a web demo under /ui.

    Each of NAMES is a shipped generator, a folder or hf://owner/name; other=FOLDER gives it a name of your own, by which
    requests choose it ("model"). Without names UNI_INSTRUCT_BUNDLE, else every generator that ships. Ctrl-C stops the server.
    docs/serving.md has the API, the metrics and the settings.

    Example: uni-instruct serve digits runs/mine/generator --port 3000
    """
    for package in ("bentoml", "prometheus_client", "psutil", "pydantic", "starlette"):
        if find_spec(package) is None:
            raise MissingExtraError(package, extra="serve")
    from uni_instruct.serve.process import Server
    from uni_instruct.serve.settings import PREFIX, settings_from_environment
    from uni_instruct.serve.sources import sources_by_name

    # Everything that can be wrong is found here, in a second; a worker would say it in the middle of its own log.
    settings = settings_from_environment()
    wanted = engine or settings.engine
    bundles = {name: Bundle.open(source) for name, source in sources_by_name(names or settings.bundle).items()}
    for bundle in bundles.values():
        _check(bundle, wanted)
    address = free_address(host, port)
    environment = {
        **os.environ,
        "BENTOML_DO_NOT_TRACK": "true",
        "GRADIO_ANALYTICS_ENABLED": "False",
        f"{PREFIX}BUNDLE": json.dumps([f"{name}={bundle.path.resolve()}" for name, bundle in bundles.items()]),
        f"{PREFIX}ENGINE": wanted or "",
        f"{PREFIX}WORKERS": str(workers),
    }
    with tempfile.TemporaryDirectory(prefix="uni-instruct-serve-") as folder, _signals(_request_stop):
        # BentoML keeps its files in that folder, and imports nothing that happens to lie in the user's.
        environment.setdefault("BENTOML_HOME", folder)
        server = Server(address, port, environment, folder)
        try:
            server.wait_until_ready()
            _announce(bundles, server.url, workers)
            server.wait()
        except _StopRequested:
            click.echo("\nstopping", err=True)
        finally:
            # A second Ctrl-C would end this process and leave the server running.
            with _signals(signal.SIG_IGN):
                server.stop()


def _check(bundle: Bundle, engine: str | None) -> None:
    """Raises RequestError for latents and for an engine that cannot run, BundleError for damaged files."""
    bundle.check_makes_pictures()
    if stored := bundle.engines().get(select_engine(bundle, engine).engine_id):
        stored.file()


def _announce(names: Iterable[str], url: str, workers: int) -> None:
    click.echo(f"serving on {url}  (Ctrl-C stops)")
    for place, name in enumerate(names):
        click.echo(f"{'' if place else 'generator':<10} {name}")
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
