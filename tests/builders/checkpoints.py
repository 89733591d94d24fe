"""Checkpoints in the formats of EDM, EDM2, SiD and their successors, written without any of their code.

`as_peer` gives a module the name of a class of theirs; `PeersPickler` then writes it as their persistent classes do. The
globals that this needs exist while something is pickled, and at no other time.
"""

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SOURCE = "raise RuntimeError('a module_src was executed')\n"
DATASET = {"class_name": "training.dataset.ImageFolderDataset", "path": "cifar10.zip", "use_labels": False, "resolution": 8}
GAIN = np.sqrt(0.2)
_PLAIN = (str, int, float, bool, list, tuple, dict, set, type(None))


class EasyDict(dict[str, Any]):
    """NVIDIA's dict, as a type to pickle."""


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("a persistent object was made by its own loader")


class PeerObject:
    """An instance of a class of theirs that is no module: a loss, an encoder."""

    def __init__(self, class_name: str, **state: Any):
        self.class_name, self.state = class_name, {"_init_args": (), "_init_kwargs": {}, **state}


class PeersPickler(pickle.Pickler):
    """Writes modules and PeerObjects as persistent classes do: a REDUCE of one global on a dict that holds source code."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, PeerObject):
            return _reconstruct_persistent_obj, (_meta(value.class_name, value.state),)
        if isinstance(value, nn.Module) and type(value) is not nn.ModuleDict:
            state: dict[str, Any] = {"_init_args": (), "_init_kwargs": {}}
            state |= {name: part for name, part in vars(value).items() if isinstance(part, _PLAIN) and name != "peer_class"}
            return _reconstruct_persistent_obj, (_meta(getattr(value, "peer_class", type(value).__name__), state),)
        return NotImplemented


def as_peer(module: nn.Module, class_name: str, arguments: dict[str, Any] | None = None, **attributes: Any) -> nn.Module:
    """The module as an instance of that class, made with these arguments, with these attributes."""
    module.peer_class, module._init_args, module._init_kwargs = class_name, (), arguments or {}  # type: ignore[assignment]
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def tiny_peer(seed: int = 0, gain: Any = GAIN) -> nn.Module:
    """An EDMPrecond around a SongUNet of a few layers: a buffer that is kept, one that is not, and a parameter that is None.

    gain: an argument of one layer; EDM's are NumPy's numbers, EDM2 has none of them.
    """
    rng = torch.Generator().manual_seed(seed)
    shape = {"img_resolution": 8, "img_channels": 1, "label_dim": 0}
    within = {"model_channels": 4, "channel_mult": [1, 2], "dropout": 0.13, "resample_filter": [1, 1]}
    conv, norm = nn.Conv2d(1, 4, 3, bias=False), nn.GroupNorm(2, 4)
    conv.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
    conv.register_buffer("scratch", torch.ones(3), persistent=False)
    unet = as_peer(
        nn.Module(), "SongUNet", {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 0, **within}
    )
    unet.map_label = None  # type: ignore[assignment]
    unet.enc = nn.ModuleDict({"8x8_conv": as_peer(conv, "Conv2d"), "8x8_norm": as_peer(norm, "GroupNorm")})
    unet.dec = nn.ModuleDict({"8x8_aux_conv": as_peer(nn.Conv2d(4, 1, 3), "Conv2d", {"init_weight": gain})})
    net = as_peer(nn.Module(), "EDMPrecond", {"model_type": "SongUNet", **within, **shape}, **shape)
    net.use_fp16, net.sigma_min, net.sigma_max, net.sigma_data = False, 0, float("inf"), 0.5  # type: ignore[assignment]
    net.model = unet
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return net.eval().requires_grad_(False)


def write_edm_pickle(path: Path, net: nn.Module, protocol: int = 4, **extra: Any) -> Path:
    """EDM's network snapshot; extra keys are added to it or replace its own."""
    loss, augment = PeerObject("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5), PeerObject("AugmentPipe", p=0.12)
    value = {"ema": net, "loss_fn": loss, "augment_pipe": augment, "dataset_kwargs": dict(DATASET)}
    return _dump(path, value | extra, protocol)


def write_edm2_pickle(path: Path, net: nn.Module, protocol: int = 4, encoder: PeerObject | None = None) -> Path:
    """EDM2's network snapshot. The network is half precision there; what is given is written as it is.

    encoder: `latent_encoder` unless given; EDM2's snapshots for ImageNet-64 have a StandardRGBEncoder.
    """
    encoder = encoder or latent_encoder()
    loss = PeerObject("EDM2Loss", P_mean=-0.4, P_std=1.0)
    return _dump(path, EasyDict(encoder=encoder, dataset_kwargs=EasyDict(DATASET), loss_fn=loss, ema=net), protocol)


def latent_encoder() -> PeerObject:
    """EDM2's, as it is pickled: the way from the VAE's latents to the network's."""
    scale = np.float32(0.5) / np.array([4.17, 4.62, 3.71, 3.28], np.float32)
    bias = -np.array([5.81, 3.25, 0.12, -2.15], np.float32) * scale
    return PeerObject("StabilityVAEEncoder", vae_name="sd-vae-ft-mse", scale=scale, bias=bias, batch_size=8, _vae=None)


def write_sid_pickle(path: Path, net: nn.Module, protocol: int = 4) -> Path:
    """SiD's snapshot, also SiDA's and Uni-Instruct's."""
    return _dump(path, {"ema": net}, protocol)


def write_sid_state(path: Path, nets: dict[str, nn.Module], *, modules: bool, legacy: bool = False) -> Path:
    """SiD's training state: fake_score, G and G_ema, as modules, or as weights under names that end in _state."""
    value = {role if modules else f"{role}_state": net if modules else net.state_dict() for role, net in nets.items()}
    optimizers = {name: adam_state(nets["G"]) for name in ("fake_score_optimizer_state", "g_optimizer_state")}
    return write_torch(path, value | optimizers, legacy=legacy)


def write_edm_state(path: Path, net: nn.Module, *, legacy: bool = False) -> Path:
    """EDM's training state."""
    return write_torch(path, {"net": net, "optimizer_state": adam_state(net)}, legacy=legacy)


def write_edm2_state(path: Path, net: nn.Module) -> Path:
    """EDM2's training state, with two averages."""
    weights = net.state_dict()
    averages = {"stds": [0.05, 0.1], "emas": [weights, {name: 2 * array for name, array in weights.items()}]}
    progress = EasyDict(cur_nimg=4096, total_elapsed_time=1.5)
    loss = {"P_mean": -0.4, "_init_kwargs": {}}
    return write_torch(
        path, {"state": progress, "net": weights, "loss_fn": loss, "optimizer": adam_state(net), "ema": averages}
    )


def write_torch(path: Path, value: Any, *, legacy: bool = False) -> Path:
    """torch.save, with the classes that it meets named as theirs."""
    pickling = types.SimpleNamespace(Pickler=PeersPickler, dump=pickle.dump, __name__="pickle")
    with _their_names():
        torch.save(value, path, pickle_module=pickling, _use_new_zipfile_serialization=not legacy)
    return path


def adam_state(net: nn.Module) -> dict[str, Any]:
    """The state of an optimizer after one step."""
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in net.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-5, betas=(0.0, 0.999))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def assert_equal(found: Any, written: Any, ordered: bool = True) -> None:
    """The same to the last bit, tensors as arrays, bfloat16 widened."""
    if isinstance(written, torch.Tensor):
        written = (written.float() if written.dtype == torch.bfloat16 else written).detach().numpy()
    if isinstance(written, np.ndarray):
        assert (type(found), found.dtype, found.shape) == (np.ndarray, written.dtype, written.shape)
        assert found.tobytes() == np.ascontiguousarray(written).tobytes()
    elif isinstance(written, dict):
        assert type(found) is dict
        assert list(found) == list(written) if ordered else found.keys() == written.keys()
        for key, value in written.items():
            assert_equal(found[key], value, ordered)
    elif isinstance(written, list | tuple):
        assert type(found) is type(written)
        assert len(found) == len(written)
        for part, value in zip(found, written, strict=True):
            assert_equal(part, value, ordered)
    else:
        assert found == written


def _meta(class_name: str, state: dict[str, Any]) -> dict[str, Any]:
    return {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}


def _dump(path: Path, value: Any, protocol: int) -> Path:
    with _their_names(), path.open("wb") as file:
        PeersPickler(file, protocol).dump(value)
    return path


@contextmanager
def _their_names() -> Iterator[None]:
    """Their modules, importable as far as a pickler looks."""
    made = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    for kind, module in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
        kind.__module__ = module
        setattr(made[module], kind.__name__, kind)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
