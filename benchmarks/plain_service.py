"""What `benchmarks/serving.py` compares with: a BentoML endpoint as one writes it first, one engine call per request."""

import os

import bentoml
from PIL.Image import Image

from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.images import to_pil


@bentoml.service(workers=1)
class Plain:
    """One seed, one image, one engine call."""

    def __init__(self) -> None:
        self.engine = open_engine(os.environ["UNI_INSTRUCT_BUNDLE"], os.environ.get("UNI_INSTRUCT_ENGINE") or None)

    @bentoml.api
    async def generate_images(self, seed: int) -> Image:
        """A PNG of the seed."""
        class_ids = resolve_class_ids(self.engine.spec, [seed])
        return to_pil(generate_images(self.engine, [seed], class_ids)[0])
