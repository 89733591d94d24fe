"""A BentoML endpoint as one writes it first: one engine call per request. Its logs, metrics and traces are off."""

import bentoml
from model import Model

QUIET = {"logging": {"access": {"enabled": False}}, "metrics": {"enabled": False}, "tracing": {"excluded_urls": ".*"}}


@bentoml.service(workers=1, **QUIET)
class Plain:
    """One seed, one image, one engine call."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api
    async def generate(self, seed: int) -> bytes:
        """A PNG of the seed."""
        return self.model.pngs([seed])[0]
