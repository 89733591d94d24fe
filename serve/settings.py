"""How the server runs: read from environment variables, so that a container, `bentoml serve` and the CLI agree."""

import os
from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from uni_instruct.bundle import default_generator
from uni_instruct.errors import RequestError

PREFIX = "UNI_INSTRUCT_"


class Settings(BaseModel):
    """One server. Every field is an environment variable of the same name: UNI_INSTRUCT_BUNDLE and so on.

    The limits count images, per worker. A wrong value raises pydantic's ValidationError, a queue that is smaller than one
    request RequestError; `settings_from_environment` raises RequestError for both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str = Field(default_factory=default_generator, description="A folder, or the name of a shipped generator.")
    engine: str | None = Field(None, description="An engine id, or a runtime. None: the fastest here.")
    device: str | None = Field(None, description="cpu, cuda or cuda:1. None: a GPU where the engine can use one.")
    api_key: str | None = Field(None, description="The key that every request must bring. None leaves the API open.")
    ui: bool = Field(True, description="Whether the web demo is served under /ui. It needs workers = 1.")
    tracing: bool = Field(False, description="Whether requests become OpenTelemetry spans, as BentoML is configured for them.")
    workers: PositiveInt = Field(1, description="Processes that each hold one engine.")
    timeout_s: PositiveFloat = Field(30.0, description="How long a request may take, waiting included.")
    queue_images: int = Field(1024, description="How many images may wait.")
    request_images: PositiveInt = Field(256, description="How many images one request may ask for.")
    max_batch: PositiveInt = Field(64, description="How many images one engine call may make.")
    max_batch_ms: PositiveFloat = Field(250.0, description="How long one engine call may take; larger batches are not used.")
    max_body_bytes: PositiveInt = Field(1 << 20, description="The longest body of a request that is read.")

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> Self:
        # A request that fits no empty queue would be told to come back later, for ever.
        if self.queue_images < self.request_images:
            raise _wrong("queue_images", self.queue_images, f"give at least request_images, {self.request_images}")
        return self

    @property
    def serves_ui(self) -> bool:
        """Whether /ui exists: the demo keeps its state in one process, so it is off with several workers."""
        return self.ui and self.workers == 1


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings; a variable that is absent or empty leaves the default. Raises RequestError for a bad value."""
    texts = {name: environment.get(PREFIX + name.upper(), "") for name in Settings.model_fields}
    try:
        return Settings.model_validate({name: text for name, text in texts.items() if text})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        remedy = next(remedy for start, remedy in _REMEDIES.items() if first["type"].startswith(start))
        raise _wrong(str(first["loc"][0]), first["input"], remedy) from None


# How the name of pydantic's error begins -> what to give instead. The last row takes whatever the others do not.
_REMEDIES = {
    "int": "give an integer",
    "float": "give a number",
    "bool": "give true or false",
    "": "give a positive number",
}


def _wrong(name: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"{PREFIX}{name.upper()} is {value}", remedy=remedy, param=name)
