"""How the server runs: read from the environment, so that a container, `bentoml serve` and the CLI agree."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from uni_instruct.bundle import default_generator
from uni_instruct.errors import RequestError

PREFIX = "UNI_INSTRUCT_"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One server. Every field is an environment variable of the same name: UNI_INSTRUCT_BUNDLE and so on.

    bundle: a folder, or the name of a shipped generator. engine: an engine id or a runtime, None for the fastest here. api_key:
    None leaves the API open. ui: the web demo under /ui, which needs workers = 1. tracing: leave requests to OpenTelemetry, as
    BentoML is configured for it. The limits count images, per worker.
    """

    bundle: str = field(default_factory=default_generator)
    engine: str | None = None
    api_key: str | None = None
    ui: bool = True
    tracing: bool = False
    workers: int = 1
    timeout_s: float = 30.0
    queue_images: int = 1024
    request_images: int = 256
    max_batch: int = 64
    max_batch_ms: float = 250.0
    max_body_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("workers", "timeout_s", "request_images", "max_batch", "max_batch_ms", "max_body_bytes"):
            if not getattr(self, name) > 0:  # also refuses nan
                raise _wrong(name, getattr(self, name), "give a positive number")
        if self.queue_images < self.request_images:
            raise _wrong("queue_images", self.queue_images, f"give at least request_images, {self.request_images}")

    @property
    def serves_ui(self) -> bool:
        """Whether /ui exists: the demo keeps its state in one process, so it is off with several workers."""
        return self.ui and self.workers == 1


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings; a variable that is absent or empty leaves the default. Raises RequestError for a bad value."""
    values: dict[str, Any] = {}
    for setting in fields(Settings):
        text = environment.get(PREFIX + setting.name.upper(), "")
        if text:
            values[setting.name] = _parse(setting.name, setting.type, text)
    return Settings(**values)


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]


# A field's type -> how to read it and what it must look like.
_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "give an integer"),
    float: (float, "give a number"),
    bool: (_flag, "give true or false"),
}


def _parse(name: str, kind: Any, text: str) -> Any:
    read, remedy = _READERS.get(kind, (str, ""))
    try:
        return read(text)
    except (ValueError, KeyError):
        raise _wrong(name, text, remedy) from None


def _wrong(name: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"{PREFIX}{name.upper()} is {value}", remedy=remedy, param=name)
