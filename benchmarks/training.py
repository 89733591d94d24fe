"""How fast a distillation step is: the trainer against a plain loop in fp32, on one machine and in one run.

`python benchmarks/training.py [--channels 64] [--batch 32] [--resolution 32] [--rounds 5]`. Without sizes there are two rows: a
32x32 network that a CPU trains, and that of the digits recipe; where there is a GPU, the trainer alone on CIFAR-10's network.
Both loops take the same step: Uni-Instruct's expanded family, Jeffreys divergence, a discriminator on the fake score's encoder,
one update of the critic and one of the generator, equal networks and batch. They take turns, round by round. The plain loop is
what one writes first: eager fp32, torch's default Adam, an average updated parameter by parameter, new images for the
generator's update. Shares of the peak are a loop's own FLOPs per second over those of a large bf16 matrix product. Threads are
torch's: set OMP_NUM_THREADS.

`--recipe fashion-mnist [--busy]` measures that recipe against what it was before instead (recipe_speed.py).
"""

import argparse
import copy
import dataclasses
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from machine import describe_machine, time_of
from recipe_speed import SHAPES, compare_recipes
from torch import Tensor

from uni_instruct.data.dataset import ArrayReader, Dataset
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.critic import Critic
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.flops import count_flops
from uni_instruct.networks.one_step import one_step
from uni_instruct.spec import ModelSpec
from uni_instruct.system.processes import keep_freed_memory, sleep_while_waiting
from uni_instruct.train.config import DistillationConfig, LoopConfig, Recipe
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.divergences.find import find_divergence
from uni_instruct.train.objective.terms import DiffusedBatch, discriminator_loss, expanded_terms, sid_weight
from uni_instruct.train.optimization.distributed import start_fabric
from uni_instruct.train.rng import initial_weights, step_rng
from uni_instruct.train.stages.data_loader import DataLoader
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage
from uni_instruct.train.stages.teacher import denoising_loss

OBJECTIVE = ObjectiveConfig(divergence="jeffreys")
IMAGES = 1024
LEARNING_RATE = 1e-5
SIGMA_INIT = 2.5
EMA = 0.999


@dataclass(frozen=True)
class Case:
    """A network and a batch; attention is at attn_resolution."""

    name: str
    image_channels: int = 3
    resolution: int = 32
    channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attn_resolution: int = 16
    batch: int = 32

    def network(self, seed: int = 0) -> Denoiser:
        """With weights of a trained network's size: EDM starts its last convolutions near zero."""
        shape = (self.image_channels, self.resolution, self.resolution)
        arguments = {
            "model_channels": self.channels,
            "channel_mult": self.channel_mult,
            "num_blocks": self.blocks,
            "attn_resolutions": [self.attn_resolution],
            "dropout": 0.0,
        }
        spec = ModelSpec(name=self.name, noise_shape=shape, num_classes=0, network_args=arguments)
        denoiser, rng = initial_weights(lambda: build_denoiser(spec), seed), torch.Generator().manual_seed(seed)
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5
        return denoiser


CASES = (
    Case("32x32"),
    Case("digits", image_channels=1, resolution=8, channels=32, channel_mult=(1, 1), blocks=1, attn_resolution=4, batch=64),
)
CIFAR10 = Case("cifar10", channels=128, channel_mult=(2, 2, 2), blocks=4, batch=128)


class PlainLoop:
    """The same step as an ordinary implementation takes it."""

    def __init__(self, case: Case, images: Tensor):
        self.teacher = case.network().requires_grad_(False).eval()
        self.generator = copy.deepcopy(self.teacher).requires_grad_(True).train()
        self.average = copy.deepcopy(self.teacher)
        self.critic = Critic(copy.deepcopy(self.teacher).requires_grad_(True), "shared").train()
        self.generator_adam = torch.optim.Adam(self.generator.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.999))
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.999))
        self.divergence, self.images, self.batch = find_divergence("jeffreys"), images, case.batch

    def step(self) -> None:
        self.update_critic()
        self.update_student()

    def update_critic(self) -> None:
        self.critic.requires_grad_(True)
        with torch.no_grad():
            clean = self.draw_students()
        real = self.images[torch.randint(len(self.images), (self.batch,))]
        sigma = OBJECTIVE.critic_levels.draw(self.batch, torch.default_generator)
        denoised, fake_logits = self.critic(clean + sigma * torch.randn_like(clean), sigma, None)
        real_logits = self.critic(real + sigma * torch.randn_like(real), sigma, None, denoise=False).logits
        loss = denoising_loss(denoised, clean, sigma, self.teacher.sigma_data).mean()
        loss = loss + OBJECTIVE.discriminator_scale * discriminator_loss(real_logits, fake_logits).mean()
        self.critic_adam.zero_grad()
        loss.backward()
        self.critic_adam.step()

    def update_student(self) -> None:
        self.critic.requires_grad_(False)
        clean = self.draw_students()
        sigma = OBJECTIVE.levels.draw(self.batch, torch.default_generator)
        noised = clean + sigma * torch.randn_like(clean)
        fake, logits = self.critic(noised, sigma, None)
        diffused = DiffusedBatch(sigma=sigma, clean=clean, noised=noised, teacher=self.teacher(noised, sigma), fake=fake)
        ratio = logits.detach().clamp(-OBJECTIVE.logit_clamp, OBJECTIVE.logit_clamp).exp()
        terms = expanded_terms(self.divergence, diffused, ratio / ratio.mean())
        weight = sid_weight(diffused, OBJECTIVE.levels, 4)
        loss = (weight * torch.stack(list(terms.values())).sum(0)).mean()
        self.generator_adam.zero_grad()
        loss.backward()
        self.generator_adam.step()
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                average.mul_(EMA).add_(parameter, alpha=1 - EMA)

    def draw_students(self) -> Tensor:
        noise = torch.randn(self.batch, *self.images.shape[1:])
        return one_step(self.generator, noise, None, SIGMA_INIT)


def trainer(case: Case, dataset: Dataset, precision: str, channels_last: bool, compiled: bool) -> Callable[[], object]:
    """The trainer's step, as a recipe with these settings has it."""
    recipe = Recipe(
        name=case.name,
        data="random",
        objective=OBJECTIVE,
        distillation=DistillationConfig(batch=case.batch, duration_kimg=1e6, sigma_init=SIGMA_INIT),
        loop=LoopConfig(precision=precision, channels_last=channels_last, compile=compiled),
    )
    models = DistillationModels.from_teacher(case.network(), recipe)
    stage = DistillationStage(models, recipe, start_fabric(1, precision), DataLoader(dataset, case.batch, 0))
    steps = itertools.count()

    def step() -> None:
        index = next(steps)
        stage.step(index, step_rng(0, stage.name, index), False)

    return step


def random_images(case: Case) -> tuple[Dataset, Tensor]:
    """As a data set, and as the plain loop holds them: float32 in [-1, 1]."""
    shape = (IMAGES, case.resolution, case.resolution, case.image_channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    dataset = Dataset(
        name="random",
        image_shape=(case.image_channels, case.resolution, case.resolution),
        labels=None,
        num_classes=0,
        class_names=(),
        licence="",
        source="random",
        reader=ArrayReader(pixels),
    )
    return dataset, torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def compare(case: Case, options: argparse.Namespace) -> dict[str, object]:
    """Both loops in turns: a row."""
    dataset, images = random_images(case)
    loops: dict[str, Callable[[], object]] = {
        "trainer": trainer(case, dataset, options.precision, options.channels_last, options.compile)
    }
    if not torch.cuda.is_available():
        loops = {"plain": PlainLoop(case, images).step, **loops}
    flops = {name: count_flops(step) for name, step in loops.items()}  # warms up as well
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, step in loops.items():
            seconds[name].append(time_of(step))
    peak = matmul_flops_per_s()
    row: dict[str, object] = {"case": dataclasses.asdict(case), "bf16_matmul_gflops_per_s": round(peak / 1e9)}
    for name, times in seconds.items():
        row[name] = {
            "best_s": round(min(times), 4),
            "median_s": round(statistics.median(times), 4),
            "images_per_s": round(case.batch / statistics.median(times), 1),
            "gflops": round(flops[name] / 1e9, 1),
            "share_of_peak": round(flops[name] / min(times) / peak, 3),
        }
    if "plain" in seconds:
        pairs = zip(seconds["plain"], seconds["trainer"], strict=True)
        row["ratio_of_bests"] = round(min(seconds["plain"]) / min(seconds["trainer"]), 2)
        row["median_ratio_of_rounds"] = round(statistics.median(plain / ours for plain, ours in pairs), 2)
    return row


def matmul_flops_per_s(tries: int = 10) -> float:
    """Of the best of some large bf16 matrix products."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    a @ a
    return 2 * size**3 / min(time_of(lambda: a @ a) for _ in range(tries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bf16-mixed", help="the trainer's")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="the trainer's")
    parser.add_argument("--compile", action="store_true", help="the trainer's")
    parser.add_argument("--recipe", choices=SHAPES, help="measure this recipe against what it was before")
    parser.add_argument("--busy", action="store_true", help="with --recipe: beside one other busy process as well")
    options = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # which OpenMP reads when torch is loaded, so begin again
        sleep_while_waiting()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    keep_freed_memory()
    rows = [compare_recipes(options.recipe, options.rounds, options.busy)] if options.recipe else compare_loops(options)
    result = {"options": vars(options), "threads": torch.get_num_threads(), "rows": rows, "machine": describe_machine()}
    print(json.dumps(result, indent=2))


def compare_loops(options: argparse.Namespace) -> list[dict[str, object]]:
    """The trainer against a plain loop: a row for each case."""
    sizes = {name: getattr(options, name) for name in ("channels", "batch", "resolution") if getattr(options, name)}
    cases = (CIFAR10,) if torch.cuda.is_available() else CASES
    cases = (dataclasses.replace(cases[0], **sizes),) if sizes else cases
    return [compare(case, options) for case in cases]


if __name__ == "__main__":
    main()
