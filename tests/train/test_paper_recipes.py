"""The papers' recipes: their networks have the published sizes, and each takes a distillation step at its real size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from builders import checkpoints as made
from builders.data_sets import arrays_dataset, npy, zip_of
from uni_instruct.bundle import Bundle
from uni_instruct.data import open_dataset, write_zip
from uni_instruct.networks.build import build_denoiser
from uni_instruct.train.plan import plan_teacher
from uni_instruct.train.recipe import load_recipe

# Recipe -> image size, channels, classes of its data, parameters as counted in the peers' own code.
PAPERS = {
    "cifar10-uncond": (32, 3, 10, 55_733_891),
    "cifar10-cond": (32, 3, 10, 55_735_299),
    "ffhq64": (64, 3, 0, 61_805_571),
    "afhqv2-64": (64, 3, 0, 61_805_571),
    "imagenet64-cond": (64, 3, 1000, 295_899_267),
    "imagenet512-latents": (64, 4, 1000, 124_713_125),
}
CLASSES = {"ddpmpp": ("EDMPrecond", "SongUNet"), "adm": ("EDMPrecond", "DhariwalUNet"), "edm2": ("Precond", "UNet")}
INNER = {"UNet": "unet"}
# One step of everything: no warm-up, no phase before the last, nothing evaluated.
STEP = [
    "schedule=[]",
    "critic_warmup_kimg=0",
    "metric=none",
    "precision=32-true",
    "loop.samples=4",
    "loop.grid=4",
    "loop.report=false",
]


def write_data(path: Path, name: str) -> Path:
    size, channels, classes, _ = PAPERS[name]
    count, generator = classes or 4, np.random.default_rng(0)
    if channels == 4:  # latents: means and deviations
        moments = npy(np.abs(generator.normal(size=(8, size, size))).astype(np.float32))
        names = [f"{index:04d}.npy" for index in range(count)]
        return zip_of(path, dict.fromkeys(names, moments), {"labels": [[name, index] for index, name in enumerate(names)]})
    images = generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    write_zip(arrays_dataset(images, np.arange(classes) if classes else None, classes), path)
    return path


@pytest.mark.parametrize("name", PAPERS)
def test_networks_have_the_published_sizes(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert (recipe.measured, bool(recipe.published)) == ("unmeasured here", True)
    with torch.device("meta"):
        denoiser = build_denoiser(plan_teacher(recipe, open_dataset(str(write_data(tmp_path / "data.zip", name)))))
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == PAPERS[name][3]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", PAPERS)
def test_a_step_is_taken_at_the_real_size_from_a_teachers_file(name: str, tmp_path: Path) -> None:
    """Random weights in EDM's format, imported by the run itself."""
    data = write_data(tmp_path / "data.zip", name)
    spec = plan_teacher(load_recipe(name), open_dataset(str(data)))
    torch.manual_seed(0)
    size, classes, (channels, _, _) = spec.image_shape[1], spec.num_classes, spec.image_shape
    shape = {"img_resolution": size, "img_channels": channels, "label_dim": classes}
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.network_args.items()}
    args.pop("sigma_data")
    outer_class, inner_class = CLASSES[spec.network]
    outer = made.as_peer(nn.Module(), outer_class, {**shape, **args, "model_type": inner_class}, **shape)
    setattr(outer, INNER.get(inner_class, "model"), made.as_peer(build_denoiser(spec).model, inner_class, args))
    file = made.write_edm_pickle(tmp_path / "teacher.pkl", outer.eval())
    del outer

    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    sets = [f"teacher={file}", f"data={data}", "distillation.batch=1", "distillation.duration_kimg=0.001", *STEP]
    options = ["--out", str(tmp_path / "run"), "--json", "--set", *sets]
    command = [sys.executable, "-m", "uni_instruct", "train", name, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (imported,) = (tmp_path / "cache").rglob("*-teacher")
    before, after = (Bundle.open(folder).weights() for folder in (imported, tmp_path / "run" / "generator"))
    assert before.keys() == after.keys()
    assert all(np.isfinite(array).all() for array in after.values())
    assert any((before[key] != after[key]).any() for key in after)
