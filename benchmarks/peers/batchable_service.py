"""BentoML's own batching, with its logs, metrics and traces off."""

import base64

import bentoml
from model import Model
from plain_service import QUIET


@bentoml.service(workers=1, **QUIET)
class Batchable:
    """Requests gathered by BentoML, up to 64 in one engine call."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=10_000)
    async def generate(self, seeds: list[int]) -> list[str]:
        """A PNG of each seed, in base64: batches of bytes cannot be answered."""
        return [base64.b64encode(png).decode() for png in self.model.pngs(seeds)]
