"""`uni-instruct serve`: check the request, run BentoML as a child process, and stop all processes when it ends."""

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from importlib.util import find_spec
from types import FrameType
from typing import Any

import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.commands.option_types import FiniteRange
from uni_instruct.engine import select_engine
from uni_instruct.errors import MissingExtraError
from uni_instruct.serve.settings import Settings, as_environment, settings_from_environment, variable
from uni_instruct.system.ports import free_address


class _StopRequested(Exception):
    """Raised on Ctrl-C, SIGTERM or SIGHUP."""


# No options: bundles are the command's arguments, and every user of a machine can see the API key if it is an argument.
_NO_OPTIONS = ("bundle", "api_key")


def _setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every setting. An option takes precedence over the environment variable, and that over the default."""
    for setting in reversed(fields(Settings)):
        if setting.name not in _NO_OPTIONS:
            command = _option(setting)(command)
    return command


def _option(setting: "Field[Any]") -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag, minimum, maximum = "--" + setting.name.replace("_", "-"), setting.metadata["minimum"], setting.metadata["maximum"]
    open_end = not setting.metadata["or_zero"]
    numbers: dict[object, click.ParamType] = {
        int: click.IntRange(minimum, maximum, min_open=open_end),
        float: FiniteRange(minimum, maximum, min_open=open_end),
    }
    default = "" if setting.default in (None, MISSING) else f"  [default: {_shown(setting.default)}]"
    return click.option(
        f"{flag}/--no-{flag[2:]}" if setting.type is bool else flag,
        setting.name,
        type=numbers.get(setting.type),
        # None, so that an option that is not given does not override the environment variable.
        default=None,
        show_default=False,
        help=setting.metadata["help"] + default,
    )


def _shown(value: object) -> str:
    return {"True": "on", "False": "off"}.get(str(value), f"{value:g}" if isinstance(value, float) else str(value))


@click.command()
@click.argument("names", nargs=-1)
@click.option("--host", default="127.0.0.1", envvar=variable("host"), help="Address to listen on; 0.0.0.0 for every interface.")
@click.option("--port", default=3000, envvar=variable("port"), type=click.IntRange(1, 65535), help="Port to listen on.")
@_setting_options
def serve(names: tuple[str, ...], host: str, port: int, **options: object) -> None:
    """Serve generators over HTTP, with a web demo under /ui.

    Each of NAMES is a shipped generator, a folder or hf://owner/name. With other=FOLDER you choose the name by which
    requests select it ("model"). Without NAMES, UNI_INSTRUCT_BUNDLE is used if it is set, otherwise every generator that
    ships with the package. Every option has an environment variable, such as UNI_INSTRUCT_PORT for --port, which is used if
    the option is not given. Ctrl-C stops the server. docs/serving.md describes the API, the metrics and the settings.

    Example: uni-instruct serve digits runs/mine/generator --port 3000
    """
    for package in ("bentoml", "prometheus_client", "psutil", "pydantic", "starlette"):
        if find_spec(package) is None:
            raise MissingExtraError(package, extra="serve")
    from uni_instruct.serve.model_sources import sources_by_name
    from uni_instruct.serve.process.server import Server

    # Check everything before the server starts: a worker would report the same errors later, in the middle of its log.
    settings = settings_from_environment(options={"bundle": names or None, **options})
    bundles = {name: Bundle.open(source) for name, source in sources_by_name(settings.bundle).items()}
    for bundle in bundles.values():
        _check(bundle, settings.engine, settings.device)
    address = free_address(host, port)
    environment = _environment(settings, bundles)
    with tempfile.TemporaryDirectory(prefix="uni-instruct-serve-") as folder, _signals(_request_stop):
        # BentoML keeps its files in that folder. It is also the working directory, so that nothing from the user's is imported.
        environment.setdefault("BENTOML_HOME", folder)
        server: Server | None = None
        try:
            # Inside `try`: if a signal arrives while the process is being created, it ends together with this one.
            server = Server(address, port, environment, folder, settings)
            server.wait_until_ready()
            _announce(bundles, server.url, settings)
            server.wait()
        except _StopRequested:
            click.echo("\nstopping", err=True)
        finally:
            # Ignore further signals: a second Ctrl-C would end this process and leave the server running.
            with _signals(signal.SIG_IGN):
                if server is not None:
                    server.stop()


def _environment(settings: Settings, bundles: Mapping[str, Bundle]) -> dict[str, str]:
    """Return the environment of the server's processes: this process's own, with a variable for every setting."""
    return {
        **os.environ,
        "BENTOML_DO_NOT_TRACK": "true",
        "GRADIO_ANALYTICS_ENABLED": "False",
        **as_environment(settings),
        # Absolute paths, because the server runs in another working directory.
        variable("bundle"): json.dumps([f"{name}={bundle.path.resolve()}" for name, bundle in bundles.items()]),
        variable("api_key_file"): os.path.abspath(settings.api_key_file) if settings.api_key_file else "",
    }


def _check(bundle: Bundle, engine: str | None, device: str | None) -> None:
    """Check that the bundle can be served with this engine and device, without loading it.

    Raises RequestError if it makes latents or the engine or device is not available, BundleError for damaged files, and the
    other errors of `select_engine`.
    """
    bundle.check_makes_pictures()
    if stored := bundle.engines().get(select_engine(bundle, engine, device).engine_id):
        stored.file()


def _announce(names: Iterable[str], url: str, settings: Settings) -> None:
    click.echo(f"serving on {url}  (Ctrl-C stops)")
    for place, name in enumerate(names):
        click.echo(f"{'' if place else 'generator':<10} {name}")
    reason = "it runs only with --workers 1" if settings.ui else "use --ui"
    click.echo(f"demo       {f'{url}/ui' if settings.serves_ui else f'off: {reason}'}")
    click.echo(f"API        {url}/docs")


def _request_stop(number: int, frame: FrameType | None) -> None:
    raise _StopRequested


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Handle Ctrl-C (SIGINT), SIGTERM and the end of the terminal (SIGHUP) with `handler` within the block."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` ignores it on purpose
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
