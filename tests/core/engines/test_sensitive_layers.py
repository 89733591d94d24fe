"""The layers that keep float32 are those that networks of every kind have at their ends and beside their blocks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engine import TORCH, TORCH_BF16, available_engines, open_engine, select_engine
from uni_instruct.engines.outputs import TOLERANCES, agreement
from uni_instruct.engines.sensitive_layers import sensitive_layers
from uni_instruct.errors import RequestError
from uni_instruct.spec import ModelSpec

NETWORKS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"model_channels": 16},
    "ncsnpp": {"model_channels": 16},
    "adm": {"model_channels": 64},
    "edm2": {"model_channels": 64, "channel_mult_noise": 1},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("patch", [1, 2])
def test_ends_and_skips_are_kept_and_most_of_the_work_is_not(network: str, patch: int) -> None:
    pytest.importorskip("torch")
    from uni_instruct.networks.build import build_denoiser

    args = {"channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [8], "patch": patch} | NETWORKS[network]
    spec = ModelSpec(name="t", noise_shape=(3, 16, 16), network=network, network_args=args)
    parameters = build_denoiser(spec).model.named_parameters()
    found = [(name, tuple(p.shape)) for name, p in parameters if name.endswith("weight") and p.ndim == 4]
    kept = sensitive_layers(found, spec)
    names = [found[i][0] for i in sorted(kept)]
    assert 0 in kept  # what reads the image
    assert any(min(found[i][1][:2]) <= 3 * patch**2 for i in kept - {0})  # what makes it
    assert {i for i, (name, _) in enumerate(found) if "skip" in name and found[i][1][2:] == (1, 1)} <= kept, names
    large = [i for i, (_, shape) in enumerate(found) if shape[2:] == (3, 3)]
    assert len(kept & set(large)) < len(large) / 2
    assert kept < sensitive_layers(found, spec, last_block=True)


def test_torch_bf16_is_opened_only_where_it_is_asked_for(tiny_bundle: Bundle, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert TORCH_BF16 not in available_engines(tiny_bundle)
    assert select_engine(tiny_bundle, "torch").engine_id == TORCH
    assert select_engine(tiny_bundle).engine_id == TORCH
    engine = open_engine(tiny_bundle, "torch-bf16")
    assert engine.id == TORCH_BF16
    z = np.random.default_rng(0).standard_normal((16, *tiny_bundle.spec.noise_shape), np.float32)
    class_ids = np.arange(16) % 10
    truth, found = open_engine(tiny_bundle, TORCH).outputs(z, class_ids), engine.outputs(z, class_ids)
    assert not agreement([found], truth.images).problem(TOLERANCES["bf16"])
    assert np.abs(found.images - truth.images).max() > 1e-5  # it did round


def test_torch_bf16_runs_no_teacher(tiny_teacher: Bundle, cli: Callable[..., tuple[int, str, str]], tmp_path: Any) -> None:
    with pytest.raises(RequestError, match="has no torch-bf16 engine; choose one of"):
        open_engine(tiny_teacher, "torch-bf16")
    code, _, errors = cli("generate", tiny_teacher.path, "--seeds", "0", "--out", tmp_path / "o", "--engine", "torch-bf16")
    assert (code, errors.count("\n")) == (2, 1)
