"""Pairs of noise z and the image that the teacher samples from it, for DMD's regression (arXiv 2311.18828, section 3.3)."""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from uni_instruct.generate import input_batches
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.one_step import as_tensors
from uni_instruct.sampler import heun_sample
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import atomic_file
from uni_instruct.system.progress import progress

# A range of seeds for pairs only: users do not evaluate with these, and the best weights are not chosen by them.
FIRST_PAIR_SEED = 2**41
SAMPLE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """noise [N, C, H, W], images [N, C, H, W] in about [-1, 1], class_ids [N] or None; on the CPU."""

    noise: Tensor
    images: Tensor
    class_ids: Tensor | None


def teacher_pairs(file: Path, teacher: Denoiser, count: int, steps: int, device: torch.device) -> Pairs:
    """The pairs in `file`. If it is missing, `count` pairs are sampled from the teacher (Heun, `steps` steps) and saved."""
    # Sampled once per run, because each pair costs a whole run of the teacher's sampler.
    if not file.exists():
        _draw(file, teacher.to(device).eval(), count, steps, device)
    stored = safetensors.torch.load_file(file)
    return Pairs(noise=stored["noise"], images=stored["images"], class_ids=stored.get("class_ids"))


def _draw(file: Path, teacher: Denoiser, count: int, steps: int, device: torch.device) -> None:
    seeds = range(FIRST_PAIR_SEED, FIRST_PAIR_SEED + count)
    spec = ModelSpec(name="teacher", noise_shape=teacher.image_shape, num_classes=teacher.num_classes, steps=steps)
    rows = []
    with progress("teacher's pairs", count, "images") as shown:
        for inputs in input_batches(spec, seeds, batch=SAMPLE_BATCH):
            z, labels = as_tensors(inputs, device)
            images = heun_sample(teacher, z, labels, steps)
            rows.append([tensor.cpu() for tensor in (z, images, labels) if isinstance(tensor, Tensor)])
            shown.advance(len(images))
    tensors = dict(zip(("noise", "images", "class_ids"), map(torch.cat, zip(*rows, strict=True)), strict=False))
    with atomic_file(file) as partial:
        partial.write_bytes(safetensors.torch.save(tensors))
