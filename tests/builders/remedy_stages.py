# ruff: noqa: E501
"""More wrong calls from Python: of the stages, of networks, data sets and scores; and how each remedy is followed."""

import dataclasses
import io
import json
import re
import tarfile
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.bundles import random_bundle
from builders.data_sets import arrays_dataset, png
from builders.remedies import first_choice
from builders.remedy_values import Value, found
from uni_instruct.cli import cli
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.engines.benchmark.comparison import BenchmarkPlan
from uni_instruct.engines.record import EngineId
from uni_instruct.evaluate.comparison import student_quantile
from uni_instruct.evaluate.scores import check_count, check_metrics
from uni_instruct.export.targets import TARGETS, choose_targets, find_target
from uni_instruct.networks.build import build_denoiser, build_preconditioning, patched_shape
from uni_instruct.networks.unet import levels
from uni_instruct.sampling.forms import read_samples
from uni_instruct.sampling.workers import WorkerOptions
from uni_instruct.serve.api_keys import read_keys
from uni_instruct.serve.load_test import TargetServer
from uni_instruct.serve.model_sources import sources_by_name
from uni_instruct.serve.ray_serve import parse
from uni_instruct.serve.settings import Settings, settings_from_environment
from uni_instruct.spec import ModelSpec, check_name
from uni_instruct.train.lab.experiments import parse_variants, plan_lab
from uni_instruct.train.monitoring.trackers import check_trackers
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.divergences.find import find_divergence
from uni_instruct.train.objective.user_functions import import_named
from uni_instruct.train.optimization.ema import Averages, power_exponent
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.stages.augment import AugmentPipe

GREY = png(np.zeros((4, 4), np.uint8))
IMAGES = np.zeros((4, 4, 4, 1), np.uint8)
NET = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


def tar(tmp: Path, **members: bytes) -> Dataset:
    """A data set of one tar, whose members' names have a dot for each underscore."""
    with tarfile.open(tmp / "x.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return open_dataset(tmp / "x.tar")


def network(name: str = "ddpmpp", side: int = 8, **arguments: Any) -> object:
    return build_denoiser(ModelSpec(name="x", noise_shape=(1, side, side), network=name, network_args={**NET, **arguments}))


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"name": "x", "noise_shape": (1, 8, 8), **changes})


def data(labels: list[int], classes: int = 3, **changes: Any) -> Dataset:
    made = arrays_dataset(IMAGES, np.array([0, 1, 2, 0]), 3)
    return dataclasses.replace(made, **{"labels": np.array(labels), "num_classes": classes, **changes})


def averages(*halflives: float) -> object:
    return Averages(torch.nn.Linear(1, 1), halflives, rampup_ratio=None)


def recipe(tmp: Path, text: str) -> object:
    (tmp / "r.yaml").write_text(text)
    return load_recipe(str(tmp / "r.yaml"), ())


def plan(tmp: Path, min_s: float = 0.2, steps: int = 1) -> BenchmarkPlan:
    return BenchmarkPlan(bundle=random_bundle(tmp / f"b{steps}", 1, steps), batches=(1,), min_s=min_s)


# Of two shards.
MANY = ("--seeds", "0-1024")


def written(out: Path, command: str, *options: str) -> Path:
    """What a command writes with --out."""
    bundle = out.parent / "bundle"
    if not bundle.exists():
        random_bundle(bundle, 1)
    cli.main([command, str(bundle), "--seeds", "0-3", "--engine", "torch", "--out", str(out), *options], standalone_mode=False)
    return out


def lab(methods: str, seeds: int = 1, *changes: str) -> object:
    return plan_lab("digits", changes, parse_variants([methods]), range(seeds), Path("lab"))


def said(remedy: str, words: str, then: object) -> Any:
    """What follows the remedy, where it says those words."""
    assert words in remedy, remedy
    return then


D, R, E, B = ("uni_instruct/data/dataset.py", "train/recipe.py", "train/lab/experiments.py", "uni_instruct/networks/build.py")
SERVING = [
    Value("serve/settings.py", "(setting_error)", lambda _: Settings(workers=0),
          lambda remedy, _: Settings(workers=said(remedy, "a number above 0", 1))),
    Value("serve/settings.py", "(setting_error)", lambda _: Settings(queue_images=1),
          lambda remedy, _: Settings(queue_images=int(found(r"request_images, (\d+)", remedy)))),
    Value("serve/settings.py", "(setting_error)", lambda _: Settings(path_prefix="images"),
          lambda remedy, _: Settings(path_prefix=found(r"such as (\S+)", remedy))),
    Value("serve/settings.py", "(setting_error)", lambda _: settings_from_environment({"UNI_INSTRUCT_UI": "perhaps"}),
          lambda remedy, _: settings_from_environment({"UNI_INSTRUCT_UI": found(r"give (\w+) or", remedy)})),
    Value("serve/api_keys.py", "(read_keys)", lambda tmp: read_keys(None, str(tmp / "none")),
          lambda remedy, tmp: (tmp / "none").write_text(said(remedy, "one key a line", "a\nb\n")) and read_keys(None, str(tmp / "none"))),
    Value("serve/api_keys.py", "{} contains no key", lambda _: read_keys(" , ", None), lambda remedy, _: read_keys(said(remedy, "add one", "a"), None)),
    Value("serve/api_keys.py", "a key in {} has", lambda _: read_keys("a b", None),
          lambda remedy, _: read_keys(said(remedy, "several keys by commas", "a,b"), None)),
    Value("serve/model_sources.py", "{} and {} are both called", lambda _: sources_by_name(["digits", "x/digits"]),
          lambda remedy, _: sources_by_name(["digits", found(r"own: (\S+)", remedy)])),
    Value("serve/model_sources.py", "no generator is named", lambda _: sources_by_name([]),
          lambda remedy, _: sources_by_name([found(r"such as (\S+)", remedy)])),
    Value("serve/ray_serve.py", "'{}' is not a setting", lambda _: parse({"bundel": "digits"}),
          lambda remedy, _: parse({first_choice(remedy): "true"})),
    Value("serve/ray_serve.py", "{}={} is not possible", lambda _: parse({"replicas": "0"}),
          lambda remedy, _: parse({"replicas": found(r"from (\d) to", remedy)})),
    Value("serve/load_test.py", "{} is not the URL", lambda _: TargetServer("ftp://x"), lambda remedy, _: TargetServer(found(r"such as (\S+)", remedy))),
]  # fmt: skip
TRAINING = [
    Value(E, "--methods names no method", lambda _: parse_variants([" , "]), lambda remedy, _: parse_variants([found(r"some of (.*)", remedy)])),
    Value(E, "(parse_variants)", lambda _: parse_variants(["sid alpha"]),
          lambda remedy, _: parse_variants([f"sid {found(r'write (key=value)', remedy)}, dmd2"])),
    Value(E, "--methods has", lambda _: parse_variants(["sid, sid"]), lambda remedy, _: parse_variants([said(remedy, "once", "sid")])),
    Value(E, "(plan_lab)", lambda _: lab("sid", 1001), lambda remedy, _: lab("sid", said(remedy, "fewer", 2))),
    Value(E, "a lab compares scores", lambda _: lab("sid", 1, "metric=none"), lambda remedy, _: lab(said(remedy, "leave loop.metric out", "sid"))),
    Value("train/monitoring/trackers.py", "tracker '{}' is unknown", lambda _: check_trackers(["paper"]),
          lambda remedy, _: check_trackers([first_choice(remedy)]) is None),
    Value("train/objective/divergences/find.py", "divergence '{}'", lambda _: find_divergence("kullback"),
          lambda remedy, _: find_divergence(first_choice(remedy))),
    Value("train/objective/user_functions.py", "{} '{}' is not the name of a function", lambda _: import_named("math", param="reward"),
          lambda remedy, _: import_named("math:sqrt", param=said(remedy, "module:function", "reward"))),
    Value("train/objective/user_functions.py", "{} '{}' cannot be imported", lambda _: import_named("nowhere.at.all:sqrt", param="reward"),
          lambda remedy, _: import_named("math:sqrt", param=said(remedy, "a module on Python's path", "reward"))),
    Value("train/objective/user_functions.py", "{} '{}': {} has no function", lambda _: import_named("math:squareroot", param="reward"),
          lambda remedy, _: import_named("math:sqrt", param=said(remedy, "correct the name", "reward"))),
    Value("train/objective/config.py", "the objective has no term", lambda _: ObjectiveConfig(divergence_scale=0.0),
          lambda remedy, _: ObjectiveConfig(divergence_scale=said(remedy, "a value above 0", 1.0))),
    Value("train/objective/config.py", "method '{}' needs a reward", lambda _: ObjectiveConfig(reward_scale=1.0),
          lambda remedy, tmp: ObjectiveConfig(reward_scale=1.0, reward=f"{tmp}/{found(r'reward=(.*?),', remedy)}")),
    Value("uni_instruct/spec.py", "name '{}' is not valid", lambda _: check_name("a\nb"),
          lambda remedy, _: check_name(found(r"such as (\w+)$", remedy)) or "taken"),
    Value("train/optimization/ema.py", "no half-life", lambda _: averages(), lambda remedy, _: averages(said(remedy, "at least one", 5.0))),
    Value("train/optimization/ema.py", "two of the averages", lambda _: averages(5.0, 5.0), lambda remedy, _: averages(said(remedy, "each once", 5.0))),
    Value("train/optimization/ema.py", "width {} of a power-function average", lambda _: power_exponent(0.5),
          lambda remedy, _: [power_exponent(float(end)) for end in re.findall(r"0\.\d+", remedy)]),
    Value("train/stages/augment.py", "augmentation probability", lambda _: AugmentPipe(probability=2.0),
          lambda remedy, _: AugmentPipe(probability=float(found(r"0 to (\d)", remedy)))),
    Value(R, "--set key '{}' is unknown", lambda _: load_recipe("digits", ["sead=1"]),
          lambda remedy, _: load_recipe("digits", [f"{found(r' (loop.seed)', remedy)}=1"])),
    Value(R, "recipe key '{}{}' is unknown", lambda tmp: recipe(tmp, "name: x\ndata: digits\ndate: 3\n"),
          lambda remedy, tmp: recipe(tmp, f"name: x\n{found('one of (data)$', remedy)}: digits\n")),
    Value(R, "recipe key '{}{}' is unknown", lambda tmp: recipe(tmp, "name: x\ndata: digits\ntmin: 3\n"),
          lambda remedy, tmp: recipe(tmp, "name: x\ndata: digits\n{1}:\n  {0}: 3\n".format(*re.findall(r"'(\w+):?'", remedy)))),
    Value(R, "(_entry)", lambda tmp: recipe(tmp, "name: x\ndata: digits\nschedule: [{until_kimg: 1}]\n"),
          lambda remedy, tmp: recipe(tmp, said(
              remedy, "add a line 'objective: ...'", "name: x\ndata: digits\nschedule: [{until_kimg: 1, objective: {}}]\n"))),
    Value(R, "(_build)", lambda tmp: recipe(tmp, "data: digits\n"),
          lambda remedy, tmp: recipe(tmp, said(remedy, "add a line 'name: ...'", "name: x\ndata: digits\n"))),
    Value(R, "recipe key '{}' is empty", lambda tmp: recipe(tmp, "name: x\ndata: digits\nloop:\n  seed:\n"),
          lambda remedy, tmp: recipe(tmp, said(remedy, "leave the line out", "name: x\ndata: digits\n"))),
    Value(R, "recipe key '{}' is {}", lambda tmp: recipe(tmp, "name: 7\ndata: digits\n"),
          lambda remedy, tmp: recipe(tmp, f"name: {found(r'quotes: (.*)', remedy)}\ndata: digits\n")),
    Value(R, "'{}' is {}, not a section", lambda tmp: recipe(tmp, "name: x\ndata: digits\nloop: 3\n"),
          lambda remedy, tmp: recipe(tmp, f"name: x\ndata: digits\nloop:\n  {found('such as .(.*?):', remedy)}: 3\n")),
]  # fmt: skip
NETWORKS = [
    Value(B, "network '{}' is unknown", lambda _: network("resnet"), lambda remedy, _: network(first_choice(remedy))),
    Value(B, "network.out_channels {} cannot be set", lambda _: network(out_channels=3), lambda remedy, _: said(remedy, "leave it out", network())),
    Value(B, "network '{}' has no argument", lambda _: network(depth=3), lambda remedy, _: said(remedy, "leave it out", network())),
    Value(B, "network '{}': {}", lambda _: network(model_channels=33), lambda remedy, _: network(model_channels=int(found(r"multiple of (\d+)", remedy)))),
    Value(B, "network '{}': {}", lambda _: network(num_blocks="x"), lambda remedy, _: said(remedy, "docs/recipes.md", network(num_blocks=2))),
    Value(B, "network.patch {} does not divide", lambda _: patched_shape((1, 9, 9), 2),
          lambda remedy, _: patched_shape((1, 9, 9), int(found(r"choose (\d)", remedy)))),
    Value(B, "(_too_coarse)", lambda _: network(side=9), lambda remedy, _: network(side=9, channel_mult=[1] * (int(found(r"fewer than (\d)", remedy)) - 1))),
    Value(B, "network.patch {} turns images", lambda _: network(side=8, patch=4, channel_mult=[1, 1, 1]),
          lambda remedy, _: network(side=8, patch=int(found(r"network.patch (\d)", remedy)), channel_mult=[1, 1, 1])),
    Value(B, "preconditioning '{}' is unknown", lambda _: build_preconditioning("vq"), lambda remedy, _: build_preconditioning(first_choice(remedy))),
    Value(B, "preconditioning '{}' has no constant", lambda _: build_preconditioning({"name": "edm", "sigma": 1.0}),
          lambda remedy, _: build_preconditioning({"name": "edm", first_choice(remedy): 1.0})),
    Value("uni_instruct/networks/unet.py", "channel_mult is empty", lambda _: levels((1, 8, 8), 16, [], []),
          lambda remedy, _: levels((1, 8, 8), 16, said(remedy, "one multiplier a level", [1, 2]), [])),
    Value("uni_instruct/networks/edm2.py", "resample_filter {} has", lambda _: network("edm2", resample_filter=[1, 2, 1]),
          lambda remedy, _: network("edm2", resample_filter=json.loads(f"[{found(r'as in ([0-9,]+)', remedy)}]"))),
]  # fmt: skip
CORE = [
    Value("uni_instruct/spec.py", "shape {} is not", lambda _: spec(noise_shape=(8, 8)), lambda remedy, _: spec(noise_shape=said(remedy, "three positive", (1, 8, 8)))),
    Value("uni_instruct/spec.py", "{} names for {} classes", lambda _: spec(num_classes=3, class_names=("a",)),
          lambda remedy, _: spec(num_classes=3, class_names=said(remedy, "or none", ()))),
    Value("uni_instruct/spec.py", "sigma_init {}, steps {}", lambda _: spec(steps=0), lambda remedy, _: spec(steps=int(found(r"steps >= (\d)", remedy)))),
    Value(D, "data set '{}' has no images", lambda _: arrays_dataset(IMAGES[:0], None), lambda remedy, _: arrays_dataset(IMAGES[: int("at least one" in remedy)], None)),
    Value(D, "data set '{}' has images of {}x{}", lambda _: arrays_dataset(IMAGES[:, :0], None), lambda remedy, _: arrays_dataset(IMAGES[:, : int("at least one pixel" in remedy)], None)),
    Value(D, "data set '{}' has {} classes, {} class names", lambda _: data([0, 1, 2, 0], class_names=("a",)),
          lambda remedy, _: data([0, 1, 2, 0], class_names=said(remedy, "name every class", ("a", "b", "c")))),
    Value(D, "data set '{}' has {} labels for", lambda _: data([0, 1]), lambda remedy, _: data(said(remedy, "label every image", [0, 1, 2, 2]))),
    Value(D, "data set '{}' has labels in", lambda _: data([0, 1, 2, 3]), lambda remedy, _: data([0, 1, 2, int(found(r"0\.\.(\d)", remedy))])),
    Value("uni_instruct/data/tar_files.py", "{} has no {}", lambda tmp: tar(tmp, a_png=GREY, a_cls=b"0", b_png=GREY),
          lambda remedy, tmp: tar(tmp, a_png=GREY, a_cls=b"0", b_png=GREY, b_cls=said(remedy, "every image a class", b"1"))),
    Value("uni_instruct/data/tar_files.py", "{} in {} holds {}, not a class id", lambda tmp: tar(tmp, a_png=GREY, a_cls=b"cat"),
          lambda remedy, tmp: tar(tmp, a_png=GREY, a_cls=said(remedy, "class ids below", b"3"))),
    Value("uni_instruct/sampling/forms.py", "there are no samples at", lambda tmp: read_samples(tmp / "none.npz"),
          lambda remedy, tmp: read_samples(written(tmp / "none.npz", found(r"'(\w+) --out'", remedy)))),
    Value("uni_instruct/sampling/forms.py", "the samples of {} are not finished", lambda tmp: read_samples(written(tmp / "s", "generate", *MANY, "--shard", "1/2")),
          lambda remedy, tmp: read_samples(written(tmp / "s", found(r"same '(\w+)' again, without --shard", remedy), *MANY))),
    Value("uni_instruct/sampling/workers.py", "--device {} names one GPU", lambda _: WorkerOptions(2).check_device("cuda:0"),
          lambda remedy, _: WorkerOptions(2).check_device(found(r"--device (\w+),", remedy)) is None),
    Value("uni_instruct/engines/record.py", "'{}' is not an engine id", lambda _: EngineId.parse("fastest"),
          lambda remedy, _: [EngineId.parse(found(pattern, remedy)) for pattern in (r"as (\S+) or", r"or (\S+);")]),
    Value("uni_instruct/engines/benchmark/comparison.py", "{} is not a duration", lambda tmp: plan(tmp, float("nan")),
          lambda remedy, tmp: plan(tmp / "y", float(found(r"such as (\S+)", remedy)))),
    Value("uni_instruct/evaluate/comparison.py", "no quantile", lambda _: student_quantile(1.0, 3),
          lambda remedy, _: [student_quantile(float(found(r"from (\S+) to", remedy)), 3), student_quantile(0.999, 3)]),
    Value("uni_instruct/evaluate/scores.py", "{} images are too few", lambda _: check_count(1), lambda remedy, _: check_count(int(found(r"least (\d+)", remedy))) is None),
    Value("uni_instruct/evaluate/scores.py", "metrics {} are not a list", lambda _: check_metrics("fd"), lambda remedy, _: check_metrics(literal_eval(found(r"such as (\[.*\])", remedy)))),
    Value("uni_instruct/evaluate/scores.py", "(check_metrics)", lambda _: check_metrics(["beauty"]), lambda remedy, _: check_metrics([first_choice(remedy)])),
    Value("export/targets.py", "target '{}' is unknown", lambda _: find_target("onnx-int8"), lambda remedy, _: find_target(first_choice(remedy))),
    Value("export/targets.py", "{} does not build for", lambda _: choose_targets(["tensorrt-rtx"], (), [12]),
          lambda remedy, _: choose_targets(["tensorrt-rtx"], (), [int(found(r"from (\d+)", remedy))])),
    Value("export/targets.py", "{} cannot build {} engines for", lambda _: next(row for row in TARGETS.values() if row.sms).for_gpu(12),
          lambda remedy, _: next(row for row in TARGETS.values() if row.sms).for_gpu(int(found(r"from (\d+)", remedy)))),
]  # fmt: skip
STAGES = [*SERVING, *TRAINING, *NETWORKS, *CORE]
