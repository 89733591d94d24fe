"""Run the weights as other projects' sampling scripts do: eager torch, float32, contiguous, with torch's default settings.

This is the baseline for the speed of all engines. It is not an engine itself: nothing is tuned, and GPUs may use TF32.
"""

from collections.abc import Callable

import numpy as np
import torch

from uni_instruct.bundle import Bundle
from uni_instruct.networks.one_step import as_tensors, load_one_step
from uni_instruct.noise import Inputs


def eager(bundle: Bundle, device: str) -> Callable[[Inputs], np.ndarray]:
    """A function from noise and class ids to images uint8 [B, H, W, C], or to latents float32 [B, C, H, W]."""
    generator = load_one_step(bundle).to(device)

    @torch.no_grad()
    def images(inputs: Inputs) -> np.ndarray:
        parts = []
        for part in inputs.parts(bundle.spec.max_decoder_batch):
            made = generator(*as_tensors(part, device))
            if bundle.spec.makes_pictures:
                # As in EDM's generate.py ("images_np" in https://github.com/NVlabs/edm) and SiD's.
                made = (made * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            parts.append(made.cpu().numpy())
        return np.concatenate(parts)

    return images
