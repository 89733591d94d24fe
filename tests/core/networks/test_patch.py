"""`network.patch`: a network that sees squares of pixels as one, wherever a network is used.

Two truths hold it: the formula, with the permutation of pixels written in NumPy, and the twin, a network with the same weights
and without a patch, of images whose squares of pixels are channels.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp, vjp

from builders.bundles import random_bundle
from builders.plans import TINY, tiny_plan
from uni_instruct.bundle import CONFIG, WEIGHTS, Bundle
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.networks.build import NETWORKS, PATCHES, build_denoiser, load_denoiser
from uni_instruct.networks.critic import Critic
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.flops import count_flops
from uni_instruct.networks.network import Network
from uni_instruct.networks.one_step import one_step
from uni_instruct.networks.preconditioning import IDDPM
from uni_instruct.sampler import heun_sample
from uni_instruct.spec import ModelSpec
from uni_instruct.train.config import LoopConfig, NetworkConfig
from uni_instruct.train.dry_run.cost import count_parameters, models_without_storage
from uni_instruct.train.dry_run.trial import CountedSteps, distillation_stage, teacher_stage
from uni_instruct.train.optimization.distributed import prepared, start_fabric
from uni_instruct.train.plan import make_plan
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.rng import step_rng

Cli = Callable[..., tuple[int, str, str]]
SHAPE = (3, 24, 16)
SIGMA = torch.tensor([0.05, 0.9, 20.0]).reshape(3, 1, 1, 1)


def unshuffle(images: np.ndarray, patch: int) -> np.ndarray:
    """[B, C, H, W] to [B, C patch^2, H / patch, W / patch]; a square's pixels follow each other row by row."""
    batch, channels, height, width = images.shape
    squares = images.reshape(batch, channels, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(batch, channels * patch**2, height // patch, width // patch)


def shuffle(squares: np.ndarray, patch: int) -> np.ndarray:
    """The way back."""
    batch, channels, height, width = squares.shape
    images = squares.reshape(batch, channels // patch**2, patch, patch, height, width).transpose(0, 1, 4, 2, 5, 3)
    return images.reshape(batch, channels // patch**2, height * patch, width * patch)


def permuted(images: Tensor, patch: int) -> Tensor:
    return torch.from_numpy(unshuffle(images.numpy(), patch))


def spec_of(
    architecture: str = "ddpmpp", patch: int = 2, num_classes: int = 4, shape: tuple[int, int, int] = SHAPE, **args: Any
) -> ModelSpec:
    sizes = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [6], "dropout": 0.0}
    return ModelSpec(
        name="test",
        noise_shape=shape,
        num_classes=num_classes,
        network=architecture,
        network_args=sizes | args | ({"patch": patch} if patch > 1 else {}),
    )


def filled(spec: ModelSpec) -> Denoiser:
    """With weights of which none is zero: last layers and gains start there."""
    torch.manual_seed(0)
    denoiser, rng = build_denoiser(spec), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.ndim:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
            else:  # EDM2's gains
                parameter.fill_(1)
    return denoiser.eval()


def twin_of(denoiser: Denoiser, spec: ModelSpec) -> Denoiser:
    """The same weights, in a network of squares of pixels as channels."""
    channels, height, width = spec.image_shape
    patch = denoiser.patch
    shape = (channels * patch**2, height // patch, width // patch)
    args = {key: value for key, value in spec.network_args.items() if key != "patch"}
    twin = build_denoiser(dataclasses.replace(spec, noise_shape=shape, network_args=args))
    twin.load_state_dict(denoiser.state_dict())
    return twin.eval()


def views(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Noised images at three levels, and classes, one of them hidden."""
    return SIGMA * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)), SIGMA, torch.tensor([1, -1, 3])


# --- the map


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_denoiser_is_preconditioning_around_a_network_of_squares(architecture: str, patch: int, classes: int) -> None:
    denoiser = filled(spec_of(architecture, patch, classes))
    x, sigma, class_ids = views()
    total = sigma.numpy() ** 2 + 0.25
    one_hot = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]) if classes else None
    with torch.no_grad():
        found = denoiser(x, sigma, class_ids if classes else None)
        seen = torch.from_numpy(unshuffle(x.numpy() / np.sqrt(total), patch))
        out = denoiser.model(seen, (sigma.log() / 4).flatten(), one_hot).numpy()
    network = sigma.numpy() * 0.5 / np.sqrt(total) * shuffle(out, patch)
    assert (found.shape, found.dtype) == (x.shape, torch.float32)
    np.testing.assert_allclose(found.numpy(), 0.25 / total * x.numpy() + network, rtol=1e-5, atol=1e-5)
    assert np.abs(network).reshape(3, -1).max(axis=1).min() > 1e-2
    first = next(iter(denoiser.model.enc.items()))
    assert first[0] == f"{24 // patch}x{16 // patch}_conv"
    assert first[1].weight.shape[1] == 3 * patch**2 + (architecture == "edm2")  # EDM2 adds a channel of ones


class Through(Network):
    """Hands on what it sees, followed by more channels of the same number where out_factor is 2."""

    emb_channels = bottleneck_channels = 1

    def __init__(self, out_factor: int = 1):
        super().__init__()
        self.out_factor, self.seen = out_factor, torch.empty(0)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        return noise_labels[:, None]

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        self.seen = x
        return [x]

    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        return torch.cat([features[-1], *[torch.full_like(features[-1], 7)] * (self.out_factor - 1)], dim=1)


def test_a_squares_pixels_are_channels_row_by_row() -> None:
    through, x = Through(), torch.arange(32.0).reshape(1, 2, 4, 4)
    denoiser = Denoiser(through, (2, 4, 4), patch=2)
    denoiser(x, torch.full((1, 1, 1, 1), 0.5))
    seen = (through.seen * 0.5**0.5).round()  # c_in is 1 / sqrt(0.5)
    assert seen[0, :, 0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert seen[0, 0].tolist() == [[0, 2], [8, 10]]


@pytest.mark.parametrize("patch", PATCHES)
def test_a_predicted_variance_is_left_out_at_full_resolution(patch: int) -> None:
    """The noise, which is the network's first half, times -sigma beside the image."""
    denoiser = Denoiser(Through(out_factor=2), SHAPE, preconditioning=IDDPM(), patch=patch)
    x, sigma, _ = views()
    torch.testing.assert_close(denoiser(x, sigma), x - sigma * x / (sigma**2 + 1).sqrt())


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_a_predicted_variance_doubles_the_networks_channels(architecture: str) -> None:
    spec = spec_of(architecture, preconditioning="iddpm")
    denoiser, (x, sigma, class_ids) = filled(spec), views()
    last = [module for name, module in denoiser.model.named_modules() if name.endswith(("aux_conv", "out_conv"))]
    assert last[-1].weight.shape[0] == 2 * 3 * 4
    with torch.no_grad():
        found, expected = denoiser(x, sigma, class_ids), twin_of(denoiser, spec)(permuted(x, 2), sigma, class_ids)
    np.testing.assert_allclose(unshuffle(found.numpy(), 2), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", PATCHES)
def test_an_image_without_noise_is_its_own_denoised_image(patch: int) -> None:
    """D(x; sigma) - x vanishes as sigma does, as c_out is about sigma and 1 - c_skip about 4 sigma^2."""
    denoiser = filled(spec_of(patch=patch))
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    levels = (1e-1, 1e-2, 1e-3, 1e-4)
    with torch.no_grad():
        errors = [(denoiser(x, torch.full((3, 1, 1, 1), level), None) - x).norm().item() for level in levels]
    orders = -np.diff(np.log10(errors))
    assert orders.min() > 0.7, errors
    assert errors[-1] < 1e-3 * x.norm()


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_derivatives_go_through_the_squares(architecture: str, patch: int) -> None:
    """Forwards and backwards agree with each other, <u, J v> = <J^T u, v>, and with the difference quotient."""
    denoiser, sigma = filled(spec_of(architecture, patch, 0)).double(), SIGMA.double()
    rng = torch.Generator().manual_seed(2)
    x, along, against = (torch.randn(3, *SHAPE, generator=rng, dtype=torch.float64) for _ in range(3))

    def denoise(images: Tensor) -> Tensor:
        return denoiser(images, sigma)

    forward, backward = jvp(denoise, x, along)[1], vjp(denoise, x, against)[1]
    step = 1e-5
    with torch.no_grad():
        quotient = (denoise(x + step * along) - denoise(x - step * along)) / (2 * step)
    assert (against * forward).sum().item() == pytest.approx((backward * along).sum().item(), rel=1e-8)
    torch.testing.assert_close(forward, quotient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_samples_are_those_of_the_twin(architecture: str, patch: int) -> None:
    spec = spec_of(architecture, patch)
    denoiser = filled(spec)
    twin, noise, class_ids = twin_of(denoiser, spec), views(4)[0] / SIGMA, torch.tensor([0, 2, 3])
    for sample in (lambda net, z: heun_sample(net, z, class_ids, 4), lambda net, z: one_step(net, z, class_ids, 2.5)):
        with torch.no_grad():
            found, expected = sample(denoiser, noise), sample(twin, permuted(noise, patch))
        assert found.shape == noise.shape
        np.testing.assert_allclose(unshuffle(found.numpy(), patch), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("discriminator", ["shared", "own"])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_critic_is_that_of_the_twin(architecture: str, discriminator: str) -> None:
    spec = spec_of(architecture)
    denoiser, inputs = filled(spec), views()
    critic, other = Critic(denoiser, discriminator), Critic(twin_of(denoiser, spec), discriminator)
    torch.nn.init.normal_(critic.head.logit.weight)
    other.load_state_dict(critic.state_dict())
    x = inputs[0].requires_grad_()
    denoised, logits = critic(*inputs)
    expected = other(permuted(x.detach(), 2), *inputs[1:])
    np.testing.assert_allclose(
        unshuffle(denoised.detach().numpy(), 2), expected.denoised.detach().numpy(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(logits, expected.logits)
    (gradient,) = torch.autograd.grad(logits.sum(), x, retain_graph=True)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    logits.sum().backward()
    encoder = denoiser if critic.own_encoder is None else critic.own_encoder
    assert all(parameter.grad is not None for parameter in encoder.model.enc.parameters())


def test_memory_format_changes_no_value() -> None:
    inputs = views()
    with torch.no_grad():
        expected = filled(spec_of())(*inputs)
        found = prepared(filled(spec_of()), LoopConfig(channels_last=True))(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- what makes no network


@pytest.mark.parametrize("patch", [0, -2, 3, 8, True, 2.0, "2", None, [2]], ids=repr)
def test_a_patch_that_is_none_is_refused(patch: Any) -> None:
    spec = dataclasses.replace(spec_of(), network_args={"patch": patch})
    with pytest.raises(RequestError) as caught:
        build_denoiser(spec)
    assert str(caught.value) == f"network.patch is {patch!r}; choose one of 1, 2, 4"
    if patch is not None:  # of a recipe: not given
        with pytest.raises(RequestError, match=r"network.patch is"):
            NetworkConfig(patch=patch)


def test_one_is_what_is_not_given() -> None:
    assert build_denoiser(dataclasses.replace(spec_of(patch=1), network_args={"patch": 1})).patch == 1
    assert NetworkConfig().args.keys() == {"sigma_data"}


@pytest.mark.parametrize(
    ("resolution", "changes", "message"),
    [
        (
            28,
            ["network.patch=4"],
            "with network.patch 4 the network sees 28x28 as 7x7, which is not divisible by 2; "
            "choose network.patch 1 or 2, or use fewer than 2 levels",
        ),
        (
            28,
            ["network.patch=4", "channel_mult=[1,1,1,1,1]"],
            "as 7x7, which is not divisible by 16; resize the data, or use fewer",
        ),
        (28, ["network.patch=1", "channel_mult=[1,1,1,1]"], "resolution 28x28 is not divisible by 8; use fewer than 4 levels"),
        (30, ["network.patch=4"], "network.patch 4 does not divide images of 30x30; choose 1 or 2, or resize the data"),
        (27, ["network.patch=2"], "network.patch 2 does not divide images of 27x27; choose 1, or resize the data"),
        (28, ["network.patch=3"], "network.patch is 3; choose one of 1, 2, 4"),
        (28, ["network.patch=0"], "network.patch is 0; choose one of 1, 2, 4"),
        (28, ["network.patch=true"], "recipe key 'network.patch' is True; give a value of type int"),
        (28, ['network.patch="2"'], "recipe key 'network.patch' is '2'; give a value of type int"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path, resolution: int, changes: list[str], message: str
) -> None:
    np.savez(tmp_path / "made.npz", arr_0=np.zeros((4, resolution, resolution, 1), np.uint8))
    sets = ["--set", f"data={tmp_path / 'made.npz'}", "network.conditional=false", *changes]
    code, out, errors = cli("train", "fashion-mnist", "--out", tmp_path / "run", *sets)
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- bundles and files


@pytest.fixture(scope="module")
def patched_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A one-step generator of 16x16 images that its network sees as 8x8. Read only."""
    return random_bundle(tmp_path_factory.mktemp("bundles") / "patched", seed=7, image_shape=(1, 16, 16), patch=2)


@pytest.fixture(scope="module")
def patched_teacher(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundles") / "teacher", seed=8, image_shape=(1, 8, 8), steps=4, patch=2)


def image_of(bundle: Bundle) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        noise = torch.randn(2, *bundle.spec.image_shape, generator=rng)
        return one_step(load_denoiser(bundle), noise, torch.tensor([1, 2]), bundle.spec.sigma_init)


def test_inspect_shows_the_patch(patched_bundle: Bundle, cli: Cli) -> None:
    code, text, _ = cli("inspect", patched_bundle.path)
    assert code == 0
    assert "images: 16x16" in text
    assert "patch 2" in text
    assert json.loads(cli("inspect", patched_bundle.path, "--json")[1])["network_args"]["patch"] == 2


@pytest.mark.parametrize("patch", [1, 4, "2"])
def test_a_bundle_whose_patch_was_altered_is_refused(patched_bundle: Bundle, tmp_path: Path, patch: Any) -> None:
    folder = shutil.copytree(patched_bundle.path, tmp_path / "bundle")
    config = json.loads((folder / CONFIG).read_text())
    config["network_args"]["patch"] = patch
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(RequestError if patch == "2" else BundleError, match=r"do not fit its network|network.patch is '2'"):
        load_denoiser(Bundle.open(folder))


@pytest.mark.parametrize("beside", [True, False])
def test_weights_of_a_patched_network_are_imported_as_such(
    patched_bundle: Bundle, cli: Cli, tmp_path: Path, beside: bool
) -> None:
    """By the config.json beside them, or by the user's word."""
    file = patched_bundle.path / WEIGHTS
    if not beside:
        file = Path(shutil.copy(file, tmp_path / "weights.safetensors"))
    code, out, errors = cli("import", file, "--out", tmp_path / "bundle", *([] if beside else ["--patch", "2"]))
    assert code == 0, errors
    assert "ddpmpp of 16x16x1" in out
    imported = Bundle.open(tmp_path / "bundle")
    assert (imported.spec.image_shape, imported.spec.network_args["patch"]) == ((1, 16, 16), 2)
    assert torch.equal(image_of(imported), image_of(patched_bundle))
    code, out, _ = cli("inspect", file)
    assert ("16x16x1" if beside else "8x8x4") in out


def test_weights_that_say_nothing_of_a_patch_have_none(patched_bundle: Bundle, cli: Cli, tmp_path: Path) -> None:
    file = shutil.copy(patched_bundle.path / WEIGHTS, tmp_path / "weights.safetensors")
    assert cli("import", file, "--latents", "--out", tmp_path / "bundle")[0] == 0
    spec = Bundle.open(tmp_path / "bundle").spec
    assert (spec.image_shape, "patch" in spec.network_args) == ((4, 8, 8), False)
    for patch, message in (
        ("4", "the network is fed 4 channels, which do not divide into patches of 4x4 pixels; give the patch"),
        ("3", "network.patch is 3; choose one of 1, 2, 4"),
    ):
        code, _, errors = cli("import", file, "--out", tmp_path / "other", "--patch", patch)
        assert (code, errors.count("\n")) == (2, 1)
        assert message in errors
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_squares_of_four_are_exported(tmp_path: Path) -> None:
    """Squares of two: tests/export/test_export.py. What is admitted agrees with torch at every batch size."""
    from uni_instruct.export.targets import export_engine

    bundle = random_bundle(tmp_path / "bundle", seed=6, num_classes=0, image_shape=(3, 24, 16), patch=4)
    parity = export_engine(bundle, "onnx-fp32").parity
    assert parity["batches"] == [1, 2, 7, 64]
    assert 0 < parity["relative_l2"] < 1e-5
    assert parity["batch_invariant"]


# --- training


def test_a_start_of_another_patch_is_refused(patched_teacher: Bundle, tmp_path: Path) -> None:
    other = random_bundle(tmp_path / "other", seed=9, image_shape=(1, 8, 8))
    given = f"teacher.bundle={patched_teacher.path}"
    with pytest.raises(RequestError, match=r"has network.patch 1, the teacher 2; start from a generator of the teacher's"):
        make_plan(load_recipe("digits", [*TINY, given, f"distillation.start={other.path}"]))


def test_a_start_of_equal_weights_but_other_images_is_refused(patched_teacher: Bundle, tmp_path: Path) -> None:
    """What a patched network is fed are also images: 4x4, of four channels. Their weights have the same names and shapes."""
    args = {key: value for key, value in patched_teacher.spec.network_args.items() if key != "patch"}
    spec = dataclasses.replace(patched_teacher.spec, noise_shape=(4, 4, 4), steps=1, network_args=args)
    twin = Bundle.write(tmp_path / "twin", spec, patched_teacher.weights(), card="# twin\n")
    load_denoiser(twin)
    with pytest.raises(RequestError, match=r"has noise_shape \(4, 4, 4\), the teacher \(1, 8, 8\)"):
        make_plan(load_recipe("digits", [*TINY, f"teacher.bundle={patched_teacher.path}", f"distillation.start={twin.path}"]))


def test_a_given_teacher_brings_its_patch(patched_teacher: Bundle) -> None:
    plan = make_plan(load_recipe("digits", [*TINY, f"teacher.bundle={patched_teacher.path}"]))
    assert build_denoiser(plan.teacher_spec).patch == 2
    stage = distillation_stage(plan, start_fabric(1, "32-true"), plan.recipe.objective, False, 2)
    critic = stage.critic.module
    assert [network.patch for network in (stage.student.module, critic.fake_score, stage.averages.primary.module)] == [2] * 3


@pytest.mark.parametrize("patch", PATCHES)
def test_flops_are_those_of_a_network_at_the_coarser_resolution(patch: int) -> None:
    """One level without resampling: every convolution is at H / patch x W / patch, every other matrix serves one image."""
    plan = tiny_plan(f"network.patch={patch}", "attn_resolutions=[]")
    weights = {name: tensor.shape for name, tensor in build_denoiser(plan.teacher_spec).named_parameters()}
    pixels = (8 // patch) ** 2
    convolutions = sum(shape.numel() for shape in weights.values() if len(shape) == 4)
    linear = sum(shape.numel() for shape in weights.values() if len(shape) == 2)
    attention = 2 * pixels**2 * 16  # queries with keys, weights with values, in the one block that attends, of 16 channels
    counted = CountedSteps(plan)
    assert counted.evaluation() == 2 * (pixels * convolutions + linear + attention)
    assert 2.8 < counted.teacher().flops / counted.evaluation() < 3
    assert count_parameters(models_without_storage(plan))["teacher"] == sum(shape.numel() for shape in weights.values())


def test_counts_without_storage_are_those_of_a_real_step() -> None:
    plan = tiny_plan("network.patch=2", "method=uni-instruct", "loop.precision=bf16-mixed", "loop.channels_last=true")
    counts = CountedSteps(plan).distillation(plan.recipe.objective, False)
    stage = distillation_stage(plan, start_fabric(1, "bf16-mixed"), plan.recipe.objective, False, 3)
    flops = count_flops(lambda: stage.step(0, step_rng(0, "generator", 0), False))
    assert flops / 3 == pytest.approx(counts.flops, rel=1e-9)


def test_a_patched_teacher_learns() -> None:
    long = ("teacher.warmup_kimg=0", "teacher.duration_kimg=1e3", "teacher.learning_rate=5e-3")
    stage = teacher_stage(tiny_plan("network.patch=2", "attn_resolutions=[4]", *long), start_fabric(1, "32-true"), 16)
    losses = [stage.step(index, step_rng(0, "teacher", index), True)["teacher/loss"].item() for index in range(40)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10]), losses


@pytest.mark.parametrize("discriminator", ["shared", "own"])
def test_a_patched_generator_is_distilled(discriminator: str) -> None:
    """The gradient reaches the first and the last layer of generator, fake score and discriminator."""
    plan = tiny_plan(
        "network.patch=2",
        "attn_resolutions=[4]",
        "divergence=forward-kl",
        f"discriminator={discriminator}",
        "precision=bf16-mixed",
    )
    stage = distillation_stage(plan, start_fabric(1, "bf16-mixed"), plan.recipe.objective, False, 4)
    generator, critic = ({k: v.clone() for k, v in o.module.state_dict().items()} for o in (stage.student, stage.critic))
    for index in range(2):
        metrics = stage.step(index, step_rng(0, "generator", index), True)
    assert stage.skipped == 0
    assert all(np.isfinite(float(value)) for value in metrics.values())
    ends = ("model.enc.4x4_conv.weight", "model.dec.4x4_aux_conv.weight")
    names = [*ends, *(f"fake_score.{end}" for end in ends), "head.conv.weight"]
    names += ["own_encoder.model.enc.4x4_conv.weight"] if discriminator == "own" else []
    now = stage.student.module.state_dict() | stage.critic.module.state_dict()
    assert [name for name in names if torch.equal(now[name], (generator | critic)[name])] == []
