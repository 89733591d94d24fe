"""A patched network on disk: shown, guarded against alteration, imported, exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builders.bundles import random_bundle
from uni_instruct.bundle import CONFIG, WEIGHTS, Bundle
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.networks.build import load_denoiser
from uni_instruct.networks.one_step import one_step

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def patched_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A one-step generator of 16x16 images that its network sees as 8x8. Read only."""
    return random_bundle(tmp_path_factory.mktemp("bundles") / "patched", seed=7, image_shape=(1, 16, 16), patch=2)


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
