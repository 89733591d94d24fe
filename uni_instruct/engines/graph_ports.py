"""The inputs and outputs of every exported graph: `export` writes them, engines feed and read them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from uni_instruct.class_mixture import ClassMixture
from uni_instruct.engines.record import StoredEngine
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.noise import Inputs, checked_inputs
from uni_instruct.spec import ModelSpec

NOISE, CLASS_IDS = "noise", "class_ids"
# The inputs for mixtures of two classes (class_mixture.py). Graphs of earlier versions have neither.
OTHER_IDS, SHARE = "other_ids", "share"
IMAGES, DENOISED = "images", "denoised"
# Engines of format 1 call the noise input this.
FORMAT_1_NOISE = "latents"


@dataclass(frozen=True)
class GraphPorts:
    """The inputs that a graph takes: the name of its noise input, and whether it has inputs for mixtures of classes."""

    spec: ModelSpec
    stored: StoredEngine
    noise: str
    mixes_classes: bool

    def checked(self, noise: ArrayLike, class_ids: ArrayLike | ClassMixture | None) -> Inputs:
        """Check the arguments of an engine's call, as `checked_inputs` does. Every exported engine calls this first.

        Raises RequestError also for a mixture of classes, if the graph has no inputs for it.
        """
        inputs = checked_inputs(self.spec, noise, class_ids)
        if isinstance(inputs.class_ids, ClassMixture) and not self.mixes_classes:
            raise RequestError(
                f"engine {self.stored.engine_id} was exported by an older version, and cannot mix classes",
                remedy=self.stored.export_again(),
                param="class_ids",
            )
        return inputs

    def feeds(self, inputs: Inputs, *, only_needed: bool = False) -> dict[str, np.ndarray]:
        """As `graph_feeds`. only_needed: leave out a mixture's inputs if no class is mixed, for a graph that has defaults."""
        mixes = isinstance(inputs.class_ids, ClassMixture) or (self.mixes_classes and not only_needed)
        return graph_feeds(inputs, self.noise, mixes_classes=mixes)


def graph_feeds(inputs: Inputs, noise: str = NOISE, *, mixes_classes: bool = True) -> dict[str, np.ndarray]:
    """The arrays to feed a graph, by input name. mixes_classes: plain class ids are fed as mixtures of a class with itself."""
    feeds, classes = {noise: inputs.noise}, inputs.class_ids
    if classes is None:
        return feeds
    if mixes_classes:
        mixture = classes if isinstance(classes, ClassMixture) else ClassMixture.of(classes)
        return feeds | {CLASS_IDS: mixture.class_ids, OTHER_IDS: mixture.other_ids, SHARE: mixture.share}
    assert not isinstance(classes, ClassMixture)
    return feeds | {CLASS_IDS: classes}


def check_interface(
    spec: ModelSpec, stored: StoredEngine, inputs: Mapping[str, Sequence[int | str]], outputs: Collection[str]
) -> GraphPorts:
    """Check a loaded graph against the spec. inputs: shapes by name, batch first; outputs: names. Returns its ports.

    Raises BundleError unless these are the inputs and outputs of the spec's generator.
    """
    noise = FORMAT_1_NOISE if FORMAT_1_NOISE in inputs else NOISE
    expected = {noise, CLASS_IDS} if spec.num_classes else {noise}
    mixes = bool(spec.num_classes) and set(inputs) == expected | {OTHER_IDS, SHARE}
    fits = mixes or set(inputs) == expected
    if not fits or set(outputs) != {IMAGES, DENOISED} or tuple(inputs[noise][1:]) != spec.noise_shape:
        raise BundleError(
            f"the engine's graph has inputs {dict(inputs)} and outputs {sorted(outputs)}, "
            f"which do not match generator '{spec.name}'",
            remedy="export the engine again",
        )
    return GraphPorts(spec, stored, noise, mixes)
