"""Pairs of z and the teacher's image of it, for DMD's regression term (arXiv 2311.18828, section 3.3)."""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from uni_instruct.files import atomic_file
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.noise import noise, random_class_ids
from uni_instruct.progress import progress
from uni_instruct.sampler import heun_sample

# Seeds of their own: neither those that users evaluate with nor those that weights are chosen on.
FIRST_PAIR_SEED = 2**41
SAMPLE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """noise [N, C, H, W], images [N, C, H, W] in about [-1, 1], class_ids [N] or None; on the CPU."""

    noise: Tensor
    images: Tensor
    class_ids: Tensor | None


def teacher_pairs(file: Path, teacher: Denoiser, count: int, steps: int, device: torch.device) -> Pairs:
    """The pairs in `file`, drawn from the teacher with its Heun sampler where they are not there yet."""
    if not file.exists():
        _draw(file, teacher.to(device).eval(), count, steps, device)
    stored = safetensors.torch.load_file(file)
    return Pairs(noise=stored["noise"], images=stored["images"], class_ids=stored.get("class_ids"))


def _draw(file: Path, teacher: Denoiser, count: int, steps: int, device: torch.device) -> None:
    seeds = range(FIRST_PAIR_SEED, FIRST_PAIR_SEED + count)
    z = torch.from_numpy(noise(seeds, teacher.image_shape))
    class_ids = torch.from_numpy(random_class_ids(seeds, teacher.num_classes)) if teacher.num_classes else None
    images = []
    with progress("teacher's pairs", count, "images") as shown:
        for start in range(0, count, SAMPLE_BATCH):
            part = slice(start, start + SAMPLE_BATCH)
            labels = None if class_ids is None else class_ids[part].to(device)
            images.append(heun_sample(teacher, z[part].to(device), labels, steps).cpu())
            shown.advance(len(images[-1]))
    tensors = {"noise": z, "images": torch.cat(images)} | ({} if class_ids is None else {"class_ids": class_ids})
    with atomic_file(file) as partial:
        partial.write_bytes(safetensors.torch.save(tensors))
