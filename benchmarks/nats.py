"""How far a student is from its teacher, in nats, from each noise level up: `python benchmarks/nats.py RUN [--images 256]`.

RUN is the folder of a distillation that has a state. KL(student || teacher) of the distributions diffused to noise level s is
the integral of u E|d|^2 du over all u >= s, d being the difference of their scores (docs/objective.md). The fake score in the
state stands for the student's. This KL is the mean of the negative log-ratio. The root of its slope in log s, s |d|, is the
noise of the term that makes the gradient exact, relative to the gradient. Both are printed for a ladder of noise levels.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from uni_instruct.bundle import Bundle
from uni_instruct.generate import input_batches
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.one_step import as_tensors, one_step

LADDER = np.geomspace(80, 0.02, 25)
BATCH = 64


def fake_score_of(run: Path, like: Bundle) -> Denoiser:
    """The fake score in the run's state."""
    state = torch.load(run / "state" / "generator.pt", map_location="cpu", weights_only=True)["stage"]["critic"]["module"]
    denoiser = build_denoiser(like.spec)
    prefix = "fake_score."
    denoiser.load_state_dict({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
    return denoiser.eval()


@torch.no_grad()
def square_slopes(run: Path, images: int) -> np.ndarray:
    """sigma^2 E|d|^2 at every level of the ladder."""
    student, teacher = Bundle.open(run / "generator"), Bundle.open(teacher_of(run))
    generator, real, fake = load_denoiser(student), load_denoiser(teacher), fake_score_of(run, teacher)
    sums = np.zeros(len(LADDER))
    for number, inputs in enumerate(input_batches(student.spec, range(images), batch=BATCH)):
        z, class_ids = as_tensors(inputs, "cpu")
        clean = one_step(generator, z, class_ids, student.spec.sigma_init)
        eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number * BATCH))
        for index, level in enumerate(LADDER):
            sigma = torch.full((len(clean), 1, 1, 1), float(level))
            noised = clean + sigma * eps
            delta = real(noised, sigma, class_ids) - fake(noised, sigma, class_ids)
            sums[index] += float((delta / sigma).square().sum())
    return sums / images


def teacher_of(run: Path) -> str:
    """The run's own teacher, or the one that it was given."""
    own = run / "teacher"
    return (
        str(own)
        if own.exists()
        else json.loads((run / "generator" / "config.json").read_text())["provenance"]["recipe"]["teacher"]["bundle"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    slopes = square_slopes(options.run, options.images)
    # From the highest level down; the ladder falls, so the steps in log sigma are positive.
    steps = np.log(LADDER[:-1] / LADDER[1:])
    nats = np.concatenate([[0.0], np.cumsum((slopes[:-1] + slopes[1:]) / 2 * steps)])
    rows = [
        {"sigma": round(float(level), 3), "nats": round(float(kl), 2), "sigma_d": round(float(np.sqrt(slope)), 2)}
        for level, kl, slope in zip(LADDER, nats, slopes, strict=True)
    ]
    print(json.dumps({"run": options.run.name, "images": options.images, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
