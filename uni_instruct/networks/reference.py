"""Torch's images in fp32 on the CPU, the reference that all engines are compared with."""

import numpy as np
import torch

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds
from uni_instruct.engines.outputs import Outputs
from uni_instruct.networks.flops import is_heavy
from uni_instruct.networks.one_step import as_tensors, load_one_step, to_uint8
from uni_instruct.noise import Inputs, noise
from uni_instruct.reference import Reference, reference_inputs
from uni_instruct.system.progress import ProgressFactory, silent

# Images at once. In a heavy network the activations of 16 images take more memory than the weights, and 4 are as fast.
_BATCH, _HEAVY_BATCH = 16, 4


def reference_outputs(
    bundle: Bundle, z: np.ndarray, class_ids: ClassIds | None, with_progress: ProgressFactory = silent, label: str = "reference"
) -> Outputs:
    """A one-step generator's images of the noise z, float32 [N, *noise_shape]. Always on the CPU, also if there is a GPU.

    The generator must make pictures, since the result contains their bytes.
    """
    parts = []
    with torch.inference_mode(), with_progress(label, len(z), "images") as bar:
        # Building a network may draw random numbers. The fork preserves the random state of a training that writes a bundle.
        with torch.random.fork_rng(devices=[]):
            generator = load_one_step(bundle)
        batch = _HEAVY_BATCH if is_heavy(bundle.spec) else _BATCH
        size = min(batch, bundle.spec.max_decoder_batch or batch)
        for start in range(0, len(z), size):
            part = slice(start, start + size)
            images = generator(*as_tensors(Inputs(z[part], None if class_ids is None else class_ids[part]), "cpu"))
            parts.append((to_uint8(images).numpy(), images.numpy()))
            bar.advance(len(images))
    pixels, images = zip(*parts, strict=True)
    return Outputs(np.concatenate(pixels), np.concatenate(images))


def make_reference(bundle: Bundle, with_progress: ProgressFactory = silent) -> Reference | None:
    """The reference for a one-step generator's stored weights.

    None for teachers and models that make latents: only torch's engine runs them.
    """
    spec = bundle.spec
    if spec.steps > 1 or not spec.makes_pictures:
        return None
    seeds, class_ids = reference_inputs(spec)
    outputs = reference_outputs(bundle, noise(seeds.tolist(), spec.noise_shape), class_ids, with_progress)
    return Reference(seeds=seeds, class_ids=class_ids, images=outputs.images, weights_sha256=bundle.weights_sha256)
