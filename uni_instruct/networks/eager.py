"""The weights run as the peers' sampling scripts run them: torch eager, float32, contiguous, torch's default settings.

What every engine's speed is a ratio to. No engine: nothing of it is tuned, or held to full float32 on a GPU.
"""

from collections.abc import Callable

import numpy as np
import torch

from uni_instruct.bundle import Bundle
from uni_instruct.networks.one_step import as_tensors, load_one_step
from uni_instruct.noise import Inputs


def eager(bundle: Bundle, device: str) -> Callable[[Inputs], np.ndarray]:
    """Noise and class ids to uint8 [B, H, W, C]; latents, which have no pixels, to float32 [B, C, H, W]."""
    generator = load_one_step(bundle).to(device)

    @torch.no_grad()
    def images(inputs: Inputs) -> np.ndarray:
        parts = []
        for part in inputs.parts(bundle.spec.images_at_once):
            made = generator(*as_tensors(part, device))
            if bundle.spec.makes_pictures:
                # EDM's generate.py and SiD's: https://github.com/NVlabs/edm, "images_np".
                made = (made * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            parts.append(made.cpu().numpy())
        return np.concatenate(parts)

    return images
