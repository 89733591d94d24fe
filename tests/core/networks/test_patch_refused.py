"""Patches that are none, or fit neither the images nor the network: refused before anything is written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.patches import spec_of
from uni_instruct.errors import RequestError
from uni_instruct.networks.build import build_denoiser
from uni_instruct.train.config import NetworkConfig

Cli = Callable[..., tuple[int, str, str]]


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
            "network.patch 4 turns images of 28x28 into inputs of 7x7, which are not divisible by 2; "
            "choose network.patch 1 or 2, or use fewer than 2 levels",
        ),
        (
            28,
            ["network.patch=4", "channel_mult=[1,1,1,1,1]"],
            "into inputs of 7x7, which are not divisible by 16; resize the data, or use fewer",
        ),
        (28, ["network.patch=1", "channel_mult=[1,1,1,1]"], "resolution 28x28 is not divisible by 8; use fewer than 4 levels"),
        (30, ["network.patch=4"], "network.patch 4 does not divide images of 30x30; choose 1 or 2, or resize the data"),
        (27, ["network.patch=2"], "network.patch 2 does not divide images of 27x27; choose 1, or resize the data"),
        (28, ["network.patch=3"], "network.patch is 3; choose one of 1, 2, 4"),
        (28, ["network.patch=0"], "network.patch is 0; choose one of 1, 2, 4"),
        (28, ["network.patch=true"], "recipe key 'network.patch' is True; give a whole number"),
        (28, ['network.patch="2"'], "recipe key 'network.patch' is '2'; write 2"),
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
