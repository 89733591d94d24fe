"""One engine, and what every peer does with it: seeds to PNGs, by the code that the product itself uses."""

import os
from collections.abc import Sequence

from uni_instruct.bundle import Bundle
from uni_instruct.engine import load_engine, select_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.images import encode


class Model:
    """The bundle and engine that the environment names; threads of the engine as the product's server has them."""

    def __init__(self) -> None:
        bundle = Bundle.open(os.environ["UNI_INSTRUCT_BUNDLE"])
        chosen = select_engine(bundle, os.environ.get("UNI_INSTRUCT_ENGINE") or None, None)
        stored = bundle.engines().get(chosen.engine_id, chosen.engine_id)
        self._engine = load_engine(bundle, stored, device=chosen.device, spin=False)
        self.pngs(range(8))

    def pngs(self, seeds: Sequence[int]) -> list[bytes]:
        """A PNG of each seed, of its own class, from one engine call."""
        class_ids = resolve_class_ids(self._engine.spec, list(seeds))
        return [encode(image) for image in generate_images(self._engine, list(seeds), class_ids)]
