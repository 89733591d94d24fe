"""Values come out of pickles and torch files as they went in, to the last bit, as NumPy arrays and without torch."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from builders.checkpoints import (
    as_peer,
    assert_equal,
    tiny_peer,
    write_edm_pickle,
    write_edm_state,
    write_sid_pickle,
)
from builders.pickles import stored, tensor, weights, zipped
from uni_instruct.checkpoints import torch_file
from uni_instruct.checkpoints.budget import Budget, Limits
from uni_instruct.checkpoints.checkpoint import read_checkpoint
from uni_instruct.checkpoints.pickle.unpickle import StoredModule, pickled, plain, read_pickle
from uni_instruct.checkpoints.safetensors_file import read_safetensors
from uni_instruct.checkpoints.source import opened
from uni_instruct.errors import FileFormatError

NETS = {role: tiny_peer(seed) for seed, role in enumerate(("fake_score", "G", "G_ema"))}
NET = NETS["fake_score"]


def read_torch(path: Path) -> Any:
    """The value that torch.save wrote, as a zip or as its old stream, whether or not there are networks in it."""
    with opened(path) as (file, _, size):
        budget = Budget(Limits(), size)
        return plain((torch_file.zipped if zipfile.is_zipfile(path) else pickled)(file, budget, size), budget)


def test_modules_keep_their_state_but_not_their_source(tmp_path: Path) -> None:
    value = read_pickle(write_edm_pickle(tmp_path / "net.pkl", NET))
    ema = value["ema"]
    assert isinstance(ema, StoredModule)
    assert (ema.class_name, ema.state["_init_kwargs"]["dropout"]) == ("EDMPrecond", 0.13)
    song = ema.state["_modules"]["model"]
    assert list(song.state["_modules"]["enc"].state["_modules"]) == ["8x8_conv", "8x8_norm"]
    assert song.state["_modules"]["enc"].class_name == "ModuleDict"
    assert song.state["_modules"]["dec"].state["_modules"]["8x8_aux_conv"].state["_init_kwargs"]["init_weight"] == 0.2**0.5
    assert "module_src" not in repr(value)
    assert "raise RuntimeError" not in repr(value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old"])
def test_tensors_are_those_of_torch(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    value = {
        "types": {str(kind): (torch.arange(-3, 4) * 1.5).to(kind) for kind in TYPES},
        "transposed": base.permute(2, 0, 1),
        "part": base[:, 1, ::2],
        "shared": [base, base[1], base.flatten()[5]],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(7),
        "expanded once": torch.ones(3, 1).expand(3, 1),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "plain": {"a": (1, -(2**40), 2**80, 1.5, None, True, "ä", b"\x00\xff"), 7: [set(), {"b"}], None: float("-inf")},
    }
    torch.save(value, tmp_path / "file.pt", _use_new_zipfile_serialization=not legacy)
    assert_equal(read_torch(tmp_path / "file.pt"), torch.load(tmp_path / "file.pt", weights_only=False))


TYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)


def test_bytes_of_a_bool_are_0_and_1(tmp_path: Path) -> None:
    """Whatever stands in the file: NumPy takes the byte of a bool for its value."""
    truths = tensor(stored(kind=b"ctorch\nBoolStorage\n"))
    zipped(weights(truths), entries={"archive/data/0": b"\x00\x01\x02\xff"})(tmp_path / "file.pt")
    assert read_torch(tmp_path / "file.pt")["w"].tobytes() == b"\x00\x01\x01\x01"


def test_arrays_are_ours_alone(tmp_path: Path) -> None:
    """Contiguous, aligned, writable; parts of one storage do not share memory, nor does the file matter any more."""
    base = torch.arange(12.0)
    torch.save({"a": base[:6], "b": base[3:9]}, tmp_path / "file.pt")
    value = read_torch(tmp_path / "file.pt")
    (tmp_path / "file.pt").write_bytes(b"")
    value["a"][:] = -1
    np.testing.assert_array_equal(value["b"], np.arange(3.0, 9.0, dtype=np.float32))
    for array in value.values():
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.flags.writeable


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays_and_scalars(tmp_path: Path, protocol: int) -> None:
    square = np.arange(6.0).reshape(2, 3)
    value = {
        "float64": square,
        "by columns": np.asfortranarray(square),
        "part": square[:, ::2],
        "half": square.astype(np.float16),
        "bool": np.array([True, False]),
        "no dimensions": np.array(3, np.int32),
        "scalars": [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True)],
    }
    new = pickle.dumps(value, protocol)
    (tmp_path / "new.pkl").write_bytes(new)
    found = read_pickle(tmp_path / "new.pkl")
    assert_equal(found, value)
    assert [type(scalar) for scalar in found["scalars"]] == [float, float, int, bool]
    if protocol < 4:  # names are lines there, and can be exchanged; NumPy 1 had another one
        (tmp_path / "old.pkl").write_bytes(new.replace(b"numpy._core.", b"numpy.core."))
        assert_equal(read_pickle(tmp_path / "old.pkl"), value)


def test_safetensors_with_its_config(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {str(kind): (torch.arange(-3, 4) * 1.5).to(kind) for kind in TYPES} | {"empty": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (network,) = read_checkpoint(tmp_path / "model.safetensors").networks
    assert network.config == {}
    (tmp_path / "config.json").write_text('{"network": "ddpmpp", "steps": [1, 2.5]}')
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    (network,) = checkpoint.networks
    assert (checkpoint.format, network.name, network.class_name) == ("safetensors", "weights", "")
    assert network.config == {"network": "ddpmpp", "steps": [1, 2.5]}
    assert_equal(network.tensors, dict(sorted(tensors.items())), ordered=False)
    assert_equal(read_safetensors(tmp_path / "model.safetensors")[0], tensors, ordered=False)


def test_safetensors_may_begin_as_pickles_do(tmp_path: Path) -> None:
    """Their first byte is that of a length, here 0x80."""
    from safetensors.numpy import save

    weights = {"w": np.arange(3, dtype=np.float32)}
    content = next(made for size in range(300) if (made := save(weights, {"note": "x" * size}))[0] == 0x80)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_equal(read_checkpoint(tmp_path / "model.safetensors").networks[0].tensors, weights)


def test_open_files_are_read_and_stay_open(tmp_path: Path) -> None:
    with write_sid_pickle(tmp_path / "net.pkl", NET).open("rb") as file:
        assert read_pickle(file).keys() == {"ema"}
        assert read_pickle(file).keys() == {"ema"}


LIMITS: dict[str, tuple[Any, str]] = {
    "file_bytes": (1000, r"has [0-9,]+ bytes, more than 1,000; raise Limits\.file_bytes"),
    "opcodes": (100, "asks for more than 100 opcodes"),
    "values": (100, "asks for more than 100 values"),
    "depth": (8, "nests values deeper than 8"),
    "text_bytes": (50, "asks for more than 50 bytes of text"),
    "tensor_ratio": (0.01, "asks for more than [0-9]+ bytes of tensors"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_hold(tmp_path: Path, name: str) -> None:
    limit, problem = LIMITS[name]
    for path in (write_edm_pickle(tmp_path / "a", NET), write_edm_state(tmp_path / "b", NET)):
        with pytest.raises(FileFormatError, match=problem):
            read_checkpoint(path, Limits(**{name: limit}))


def test_neither_torch_nor_much_memory_is_needed(tmp_path: Path) -> None:
    """In a fresh process in which importing torch fails: the peak is the file's size and little more."""
    layer = as_peer(nn.Linear(3000, 3000), "EDMPrecond")
    for path in (write_sid_pickle(tmp_path / "a", layer), write_edm_state(tmp_path / "b", layer)):
        done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
        before, after = map(int, done.stdout.split())
        assert 0.9 * path.stat().st_size < (after - before) * 1024 < 1.3 * path.stat().st_size + 2**22


MEASURE = """
import re, sys
from pathlib import Path
sys.modules["torch"] = None
from uni_instruct.checkpoints.checkpoint import read_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
checkpoint = read_checkpoint(sys.argv[1])
print(before, peak())
"""
