"""Every format of checkpoint is recognised and read to what was written; what contradicts itself is refused."""

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from builders.checkpoints import (
    DATASET,
    PeerObject,
    as_peer,
    assert_equal,
    tiny_peer,
    write_edm2_pickle,
    write_edm2_state,
    write_edm_pickle,
    write_edm_state,
    write_sid_pickle,
    write_sid_state,
    write_torch,
)
from uni_instruct.checkpoints.checkpoint import read_checkpoint
from uni_instruct.checkpoints.pickle.allowed_globals import CHECKPOINT
from uni_instruct.checkpoints.pickle.interpreter import PickleInterpreter
from uni_instruct.errors import FileFormatError, RequestError

NETS = {role: tiny_peer(seed) for seed, role in enumerate(("fake_score", "G", "G_ema"))}
NET = NETS["fake_score"]
NET2 = tiny_peer(7, gain=0.2).half()
CONFIG = {
    "model_type": "SongUNet",
    "model_channels": 4,
    "channel_mult": [1, 2],
    "dropout": 0.13,
    "resample_filter": [1, 1],
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 0,
    "use_fp16": False,
    "sigma_min": 0,
    "sigma_max": float("inf"),
    "sigma_data": 0.5,
}
ADAM = {"lr": 1e-5, "betas": [0.0, 0.999], "eps": 1e-8}
STATES = {f"{role}_state": net for role, net in NETS.items()}
# name: how it is written, the format it is recognised as, its networks by role, whether they are modules.
WRITTEN: dict[str, tuple[Callable[[Path], Path], str, dict[str, nn.Module], bool]] = {
    "EDM": (lambda path: write_edm_pickle(path, NET), "edm pickle", {"ema": NET}, True),
    "EDM, protocol 2": (lambda path: write_edm_pickle(path, NET, 2), "edm pickle", {"ema": NET}, True),
    "EDM, protocol 5": (lambda path: write_edm_pickle(path, NET, 5), "edm pickle", {"ema": NET}, True),
    "EDM2": (lambda path: write_edm2_pickle(path, NET2), "edm2 pickle", {"ema": NET2}, True),
    "EDM2, protocol 5": (lambda path: write_edm2_pickle(path, NET2, 5), "edm2 pickle", {"ema": NET2}, True),
    "SiD": (lambda path: write_sid_pickle(path, NET), "sid pickle", {"ema": NET}, True),
    "EDM's state": (lambda path: write_edm_state(path, NET), "edm training state", {"net": NET}, True),
    "EDM's old state": (lambda path: write_edm_state(path, NET, legacy=True), "edm training state", {"net": NET}, True),
    "SiD's state": (lambda path: write_sid_state(path, NETS, modules=True), "sid training state", NETS, True),
    "SiD's old state": (lambda path: write_sid_state(path, NETS, modules=True, legacy=True), "sid training state", NETS, True),
    "SiDA's state": (lambda path: write_sid_state(path, NETS, modules=False), "sid training state", STATES, False),
    "a state dict": (lambda path: write_torch(path, NET.state_dict()), "state dict", {"weights": NET}, False),
    "an old state dict": (lambda path: write_torch(path, NET.state_dict(), legacy=True), "state dict", {"weights": NET}, False),
    "two state dicts": (
        lambda path: write_torch(path, {"a": NET.state_dict(), "b": NETS["G"].state_dict(), "step": 3}),
        "state dicts",
        {"a": NET, "b": NETS["G"]},
        False,
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_networks_come_back(tmp_path: Path, name: str) -> None:
    write, form, nets, modules = WRITTEN[name]
    checkpoint = read_checkpoint(write(tmp_path / "file"))
    assert checkpoint.format == form
    assert [network.name for network in checkpoint.networks] == list(nets)
    for network, net in zip(checkpoint.networks, nets.values(), strict=True):
        assert_equal(network.tensors, net.state_dict())
        assert (network.class_name, network.config) == (("EDMPrecond", CONFIG) if modules else ("", {}))


def test_the_averages_of_edm2s_training_state(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_edm2_state(tmp_path / "state.pt", NET))
    assert checkpoint.format == "edm2 training state"
    assert [network.name for network in checkpoint.networks] == ["net", "ema 0.05", "ema 0.1"]
    assert_equal(checkpoint.networks[0].tensors, NET.state_dict())
    assert_equal(checkpoint.networks[2].tensors, {name: 2 * array for name, array in NET.state_dict().items()})
    assert checkpoint.facts["state"] == {"cur_nimg": 4096, "total_elapsed_time": 1.5}
    assert checkpoint.facts.keys() == {"state", "loss_fn", "optimizer"}


def test_facts_are_plain(tmp_path: Path) -> None:
    facts = read_checkpoint(write_edm_pickle(tmp_path / "net.pkl", NET)).facts
    assert facts == {
        "loss_fn": {"class_name": "EDMLoss", "P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5},
        "augment_pipe": {"class_name": "AugmentPipe", "p": 0.12},
        "dataset_kwargs": DATASET,
    }
    encoder = read_checkpoint(write_edm2_pickle(tmp_path / "net2.pkl", NET)).facts["encoder"]
    assert encoder["scale"] == pytest.approx([0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28], rel=1e-6)
    assert type(encoder["scale"][0]) is float
    state = read_checkpoint(write_sid_state(tmp_path / "state.pt", NETS, modules=False)).facts
    assert state.keys() == {"fake_score_optimizer_state", "g_optimizer_state"}
    (group,) = state["g_optimizer_state"]["param_groups"]
    assert {key: group[key] for key in ADAM} == ADAM
    assert "params" not in group


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    for index, written in enumerate(WRITTEN.values()):
        assert read_checkpoint(written[0](tmp_path / f"{index}.txt")).format == written[1]


# What came of reading the peers' own files with this package: a hash of names, types, shapes and values. Their own code wrote
# them (torch 2.13, NumPy 2.4, Python 3.11, weights as `fill` makes them): EDM (github.com/NVlabs/edm, commit 008a4e5), SiD
# (github.com/mingyuanzhou/SiD, 01fbb13c) and SiDA (its branch sida, a5510fdf), an EDMPrecond with a DDPM++ of 16x16 pixels, in
# snapshots and every network of training states; EDM2 (github.com/NVlabs/edm2, 4bf8162), the snapshot of a Precond in half.
REAL_DDPMPP = "bf006123ca98a6168cc86d3cb91ad9d0"
REAL_EDM2 = "784f03e1ccb749bb094ecc682b9efbc1"
# The globals that those files name, and pickles of protocol 2, as torch writes them.
REAL_COMMON = {
    "collections.OrderedDict",
    "numpy.dtype",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.nn.modules.container.ModuleDict",
    "torch_utils.persistence._reconstruct_persistent_obj",
}
REAL_GLOBALS = {
    "EDM": REAL_COMMON | {"numpy._core.multiarray.scalar", "torch.storage._load_from_bytes"},
    "EDM, protocol 2": REAL_COMMON
    | {"numpy._core.multiarray.scalar", "torch.storage._load_from_bytes", "__builtin__.set", "_codecs.encode"},
    "EDM2": REAL_COMMON
    | {
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "torch.storage._load_from_bytes",
        "dnnlib.util.EasyDict",
    },
    "EDM's state": REAL_COMMON | {"numpy._core.multiarray.scalar", "torch.FloatStorage", "__builtin__.set", "_codecs.encode"},
    "SiDA's state": {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage"},
}


def test_names_and_values_are_those_of_the_peers_files(tmp_path: Path) -> None:
    from uni_instruct.networks.ddpmpp import SongUNet
    from uni_instruct.networks.edm2 import EDM2

    args: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
    edm, edm2 = nn.Module(), nn.Module()
    edm.model = SongUNet((3, 16, 16), augment_dim=9, dropout=0.13, **args)
    edm2.unet = EDM2((4, 16, 16), 10, **args)
    edm2.logvar_fourier, edm2.logvar_linear = nn.Module(), nn.Linear(128, 1, bias=False)
    for name in ("freqs", "phases"):
        edm2.logvar_fourier.register_buffer(name, torch.ones(128))
    fill(edm)
    fill(edm2)
    for path in (
        write_edm_pickle(tmp_path / "edm.pkl", as_peer(edm, "EDMPrecond")),
        write_sid_pickle(tmp_path / "sid.pkl", edm),
        write_edm_state(tmp_path / "edm.pt", edm),
    ):
        assert digest(read_checkpoint(path).networks[0].tensors) == REAL_DDPMPP
    path = write_edm2_pickle(tmp_path / "edm2.pkl", as_peer(edm2, "Precond").half())
    assert digest(read_checkpoint(path).networks[0].tensors) == REAL_EDM2


@pytest.mark.parametrize("name", REAL_GLOBALS)
def test_the_files_made_here_name_the_globals_of_the_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What stands in for their code writes what they write."""
    named: set[str] = set()
    look_up = PickleInterpreter.named

    def listen(interpreter: PickleInterpreter, module: Any, attribute: Any) -> Any:
        if interpreter.allowed is CHECKPOINT:
            named.add(f"{module}.{attribute}")
        return look_up(interpreter, module, attribute)

    monkeypatch.setattr(PickleInterpreter, "named", listen)
    read_checkpoint(WRITTEN[name][0](tmp_path / "file"))
    assert named == REAL_GLOBALS[name]


def broken(**state: Any) -> dict[str, Any]:
    """A checkpoint whose module differs in its state from one that is fine."""
    fine = {"_parameters": {"w": torch.ones(1)}, "_buffers": {}, "_modules": {}}
    return {"ema": PeerObject("EDMPrecond", **{key: part for key, part in (fine | state).items() if part is not ...})}


def in_itself() -> dict[str, Any]:
    value: dict[str, Any] = {"ema": NET}
    value["dataset_kwargs"] = [value]
    return value


def contradicting() -> dict[str, Any]:
    net = tiny_peer()
    vars(net.model)["_init_kwargs"]["dropout"] = 0.2
    return {"ema": net}


def averages() -> dict[str, Any]:
    return {"net": NET.state_dict(), "ema": {"stds": [0.1, 0.2], "emas": [NET.state_dict()]}}


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "modules no dict": (lambda: broken(_modules=[1]), "module EDMPrecond whose _modules is not a dict"),
    "parameters no dict": (lambda: broken(_parameters=None), "module EDMPrecond whose _parameters is not a dict"),
    "buffers missing": (lambda: broken(_buffers=...), "module EDMPrecond whose _buffers is not a dict"),
    "kept buffers": (lambda: broken(_non_persistent_buffers_set=3), "module EDMPrecond whose list of buffers is broken"),
    "child no module": (lambda: broken(_modules={"model": 3}), "module EDMPrecond whose 'model' is not a module"),
    "child of another kind": (
        lambda: broken(_modules={"model": PeerObject("EDMLoss")}),
        "module EDMPrecond whose 'model' is not a module",
    ),
    "parameter no tensor": (lambda: broken(_parameters={"w": "x"}), "module EDMPrecond whose 'w' is not a tensor"),
    "name with a dot": (
        lambda: broken(_parameters={"a.b": torch.ones(1)}),
        r"module EDMPrecond with the name 'a\.b' in its _parameters",
    ),
    "name no text": (lambda: broken(_modules={3: None}), "module EDMPrecond with the name 'int' in its _modules"),
    "long name": (
        lambda: broken(_parameters={"a" * 501: torch.ones(1)}),
        r"module EDMPrecond with the name 'a{80}\.\.\.' in its _parameters",
    ),
    "name twice": (lambda: broken(_buffers={"w": torch.ones(1)}), "has two tensors 'w'"),
    "arguments": (lambda: broken(_init_kwargs=[1]), "module EDMPrecond with broken arguments"),
    "contradiction": (contradicting, "module EDMPrecond that contradicts its SongUNet about 'dropout'"),
    "cycle": (in_itself, "has a value that contains itself"),
    "no weights": (lambda: broken(_parameters={}), "has a network without weights"),
    "no network": (lambda: {"fid": {"mu": 3}}, "holds no network"),
    "no dict": (lambda: [1, 2], "holds a list, not a checkpoint"),
    "averages": (averages, "has averages in 'ema' that do not fit their widths"),
    "roles": (lambda: {1: NET, "1": NET}, "holds two networks of one name"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_contradicts_itself_is_refused(tmp_path: Path, name: str) -> None:
    make, problem = FAULTS[name]
    with pytest.raises(FileFormatError, match=f"file has a {problem}" if problem.startswith("module") else problem):
        read_checkpoint(write_torch(tmp_path / "file", make()))


@pytest.mark.parametrize("name", ["EDM", "EDM2", "SiD's state", "SiD's old state", "an old state dict"])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, name: str) -> None:
    whole = WRITTEN[name][0](tmp_path / "whole").read_bytes()
    for size in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match=r"copy or download it again|is not a checkpoint"):
            read_checkpoint(tmp_path / "cut")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"there is no file .*nothing; give the path of a checkpoint"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(RequestError, match=r"is not a file; give the path"):
        read_checkpoint(tmp_path)
    (tmp_path / "text").write_text("hello, this is no checkpoint")
    with pytest.raises(FileFormatError, match=r"text is not a checkpoint: neither a pickle, nor torch's zip, nor safetensors"):
        read_checkpoint(tmp_path / "text")


def fill(net: nn.Module) -> None:
    """Weights that a formula gives: element i is (7919 i + crc32(name) mod 1000) mod 2003, brought to [-1, 1]."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not name.endswith("resample_filter"):
                values = (np.arange(tensor.numel()) * 7919 + zlib.crc32(name.encode()) % 1000) % 2003
                tensor.copy_(torch.from_numpy(((values - 1001) / 1001).astype(np.float32)).reshape(tensor.shape))


def digest(tensors: dict[str, np.ndarray]) -> str:
    """A hash of names, types, shapes and values."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode() + tensors[name].tobytes())
    return hashed.hexdigest()[:32]
