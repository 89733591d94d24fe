"""The interface of every exported graph: what `export` writes, and what engines feed and read."""

from collections.abc import Collection, Mapping, Sequence

from uni_instruct.errors import BundleError
from uni_instruct.spec import ModelSpec

NOISE, CLASS_IDS = "noise", "class_ids"
IMAGES, DENOISED = "images", "denoised"
# What engines of format 1 call their noise.
FORMER_NOISE = "latents"


def check_interface(spec: ModelSpec, inputs: Mapping[str, Sequence[int | str]], outputs: Collection[str]) -> str:
    """The name that the graph gives to its noise; inputs are the shapes by name, the batch first.

    Raises BundleError unless these are the ports of the spec's generator.
    """
    noise = FORMER_NOISE if FORMER_NOISE in inputs else NOISE
    expected = {noise, CLASS_IDS} if spec.num_classes else {noise}
    if set(inputs) != expected or set(outputs) != {IMAGES, DENOISED} or tuple(inputs[noise][1:]) != spec.noise_shape:
        raise BundleError(
            f"the graph maps {dict(inputs)} to {sorted(outputs)}, which does not fit generator '{spec.name}'",
            remedy="export the engine again",
        )
    return noise
