"""The server's settings. Each comes from an option of `serve`, else from an environment variable, else from its default."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from typing import Any

from uni_instruct.errors import RequestError
from uni_instruct.serve.api_keys import read_keys
from uni_instruct.serve.model_sources import default_sources, split_sources

PREFIX = "UNI_INSTRUCT_"


# A day, and a million. Larger values are taken for typing errors.
_MAX_SECONDS, _MAX_NUMBER = 86_400.0, 1_000_000
# The server's own paths begin with these. If one were a proxy's prefix, a path would not show whether the proxy removed it.
_OWN_FOLDERS = ("/v1", "/v1/about", "/v1/images", "/v1/models", "/ui", "/static_content")
# The metadata of settings that are declared without `_setting`. None of them is a number, so the limits have no effect.
_NO_NUMBER = {"minimum": 0, "maximum": _MAX_NUMBER, "or_zero": False}


def _setting(default: object, help: str, *, minimum: float = 0, maximum: float = _MAX_NUMBER, or_zero: bool = False) -> Any:
    """Declare a field of Settings with its help text. Numbers must be > `minimum` (or 0 if `or_zero`) and <= `maximum`."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, "or_zero": or_zero})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one server. Every field is an environment variable (UNI_INSTRUCT_TIMEOUT_S for `timeout_s`).

    Every field except `bundle` and `api_key` is also an option of `serve`. queue_images, max_batch and max_batch_ms apply per
    worker and model, connections per worker. Raises RequestError for a bad value.
    """

    bundle: tuple[str, ...] = field(
        default_factory=default_sources,
        metadata={
            **_NO_NUMBER,
            "help": "Folders, names of shipped generators, hf://owner/name, or NAME=one of these.",
        },
    )
    engine: str | None = _setting(
        None,
        "Engine id, such as onnx-fp32, or runtime, such as onnx. By default the fastest engine that can be trusted here.",
    )
    device: str | None = _setting(None, "cpu, cuda or cuda:1. By default a GPU, if the engine can use one.")
    workers: int = _setting(
        1, "Worker processes, each of which loads every generator. The demo needs exactly 1.", maximum=10_000
    )
    ui: bool = _setting(True, "The web demo under /ui.")
    # Secret: not in `repr`, and not an option, because other users of a machine can see a process's arguments.
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={**_NO_NUMBER, "help": "API keys, separated by commas. Requests must send one of them."},
    )
    api_key_file: str | None = _setting(None, "File with one API key per line. Requests must send one of them.")
    metrics_open: bool = _setting(False, "Serve /metrics without an API key, for a Prometheus server that has none.")
    cors_origins: str | None = _setting(None, "Origins whose pages may call the API (CORS), separated by commas; * for all.")
    path_prefix: str | None = _setting(
        None, "Path under which a proxy serves this server, such as /images. The proxy may remove it or keep it."
    )
    timeout_s: float = _setting(30.0, "Seconds that a request may take, including the time in the queue.", maximum=_MAX_SECONDS)
    grace_s: float = _setting(
        10.0, "Seconds that running requests have to finish when the server is stopped.", maximum=_MAX_SECONDS
    )
    receive_s: float = _setting(
        10.0,
        "Seconds in which a request must arrive completely, from its first byte (on a new connection, from connecting).",
        maximum=_MAX_SECONDS,
    )
    keep_alive_s: float = _setting(65.0, "Seconds that a connection may stay open between two requests.", maximum=_MAX_SECONDS)
    connections: int = _setting(
        1000, "Open connections per worker. One more closes the one that has been without a request for longest.", minimum=3
    )
    queue_images: int = _setting(
        1024, "Images that may wait in the queue, per worker and generator. Requests beyond that get 429."
    )
    request_images: int = _setting(256, "Largest number of images per request.")
    max_batch: int = _setting(64, "Largest number of images per engine call.")
    max_batch_ms: float = _setting(
        250.0, "Milliseconds that one engine call may take. Batch sizes that take longer are not used."
    )
    reload_s: float = _setting(
        2.0,
        "Seconds between two checks whether a bundle has changed on disk (it is then loaded again); 0: never.",
        maximum=_MAX_SECONDS,
        or_zero=True,
    )
    max_body_bytes: int = _setting(1 << 16, "Largest body of a request in bytes, also after decompression.", maximum=1 << 31)
    access_log: bool = _setting(False, "One line of JSON on standard output for every request.")
    tracing: bool = _setting(False, "Create OpenTelemetry spans of requests. BentoML's configuration says where they are sent.")

    def __post_init__(self) -> None:
        if isinstance(self.bundle, str):
            object.__setattr__(self, "bundle", tuple(split_sources(self.bundle)))
        for setting in fields(self):
            value, minimum = getattr(self, setting.name), setting.metadata["minimum"]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            maximum = setting.metadata["maximum"]
            if number and not minimum < value <= maximum and not (value == 0 and setting.metadata["or_zero"]):
                zero = "0, or " if setting.metadata["or_zero"] else ""
                # Not ":g", which would write a million as 1e+06.
                remedy = f"give {zero}a number above {minimum:.0f}, at most {maximum:.0f}"
                raise setting_error(setting.name, value, remedy)
        # A request larger than the whole queue would get 429 "try again" forever.
        if self.queue_images < self.request_images:
            raise setting_error("queue_images", self.queue_images, f"give at least request_images, {self.request_images}")
        if self.path_prefix is not None and not (self.path_prefix.startswith("/") and len(self.path_prefix.strip("/"))):
            raise setting_error("path_prefix", self.path_prefix, "give a path, such as /images")
        if self.prefix in _OWN_FOLDERS:
            raise setting_error(
                "path_prefix",
                self.path_prefix,
                f"choose another, such as /images: paths of the server itself begin with {self.prefix}",
            )
        # Read the keys now, so that a bad key is found before anything is started.
        _ = self.keys

    @property
    def serves_ui(self) -> bool:
        """Whether /ui exists. It is off with several workers, because the demo keeps its state in one process."""
        return self.ui and self.workers == 1

    @cached_property
    def keys(self) -> tuple[bytes, ...]:
        """The API keys, one of which every request must have; empty for a server without keys. Raises RequestError."""
        return read_keys(self.api_key, self.api_key_file)

    @property
    def origins(self) -> list[str]:
        """The origins whose pages may call the API; ["*"] for all."""
        return [origin.strip().rstrip("/") for origin in (self.cors_origins or "").split(",") if origin.strip()]

    @property
    def prefix(self) -> str:
        """The path under which a proxy serves this server, without a slash at its end; empty if there is none."""
        return (self.path_prefix or "").rstrip("/")


def settings_from_environment(
    environment: Mapping[str, str] = os.environ, options: Mapping[str, object] | None = None
) -> Settings:
    """Build the settings. Each is its option unless that is None, else its variable unless that is empty, else its default.

    options: by the names of the fields. Raises RequestError for a bad value.
    """
    values: dict[str, object] = {}
    for setting in fields(Settings):
        option = (options or {}).get(setting.name)
        text = environment.get(variable(setting.name), "")
        if option is not None:
            values[setting.name] = option
        elif text:
            values[setting.name] = _parsed(setting, text)
    return Settings(**values)  # type: ignore[arg-type]


def variable(name: str) -> str:
    """Return the name of a field's environment variable."""
    return PREFIX + name.upper()


def as_environment(settings: Settings) -> dict[str, str]:
    """Return environment variables that give another process the same settings. None becomes an empty string."""
    return {variable(setting.name): _text(getattr(settings, setting.name)) for setting in fields(settings)}


def setting_error(name: str, value: object, remedy: str) -> RequestError:
    """Return the error for a setting with a bad value. It names the setting by its environment variable."""
    return RequestError(f"{variable(name)} is {value}", remedy=remedy, param=name)


def _truth(text: str) -> bool:
    return {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}[
        text.strip().lower()
    ]


# Type of a field -> the function that parses its text, and the remedy if that fails. Other types are kept as text.
_READERS: dict[object, tuple[Callable[[str], object], str]] = {
    int: (int, "give an integer"),
    float: (float, "give a number"),
    bool: (_truth, "give true or false"),
    tuple[str, ...]: (lambda text: tuple(split_sources(text)), ""),
}


def _parsed(setting: "Field[Any]", text: str) -> object:
    read, remedy = _READERS.get(setting.type, (str, ""))
    try:
        return read(text)
    except (ValueError, KeyError):
        raise setting_error(setting.name, text, remedy) from None


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return json.dumps(value)
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
