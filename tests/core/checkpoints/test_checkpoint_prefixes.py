"""Networks are found under whatever wrappers put before their names, and beside whatever those count."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.state_dicts import State, check_is_whole, saved, state_of
from uni_instruct.bundle import Bundle
from uni_instruct.checkpoints.checkpoint import read_checkpoint
from uni_instruct.checkpoints.import_bundle import choose_network
from uni_instruct.checkpoints.prefixes import WRAPPERS
from uni_instruct.checkpoints.state_dict_adapter import translate
from uni_instruct.errors import FileFormatError

Cli = Callable[..., tuple[int, str, str]]


# Two of a kind, in both orders; four of them; Lightning's and FastGen's; the names of the network's own among them.
PREFIXES = ["module.", "_orig_mod.", "net.", "model.", "module._orig_mod.", "_orig_mod.module.", "module.net._orig_mod.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_are_peeled_in_any_order(tmp_path: Path, tiny_bundle: Bundle, prefix: str) -> None:
    check_is_whole(saved(tmp_path / "x.pt", state_of(tiny_bundle, prefix)), tiny_bundle)
    bare = {f"{prefix}{name.removeprefix('model.')}": array for name, array in state_of(tiny_bundle).items()}
    check_is_whole(saved(tmp_path / "bare.pt", bare), tiny_bundle)


def test_any_wrappers_in_any_depth_give_the_same_weights(tmp_path: Path, tiny_bundle: Bundle) -> None:
    draw = random.Random(0)
    for _ in range(10):
        prefix = "".join(f"{part}." for part in draw.choices(sorted(WRAPPERS), k=draw.randint(1, 6)))
        check_is_whole(saved(tmp_path / "x.pt", state_of(tiny_bundle, prefix)), tiny_bundle)


@pytest.mark.parametrize(
    "counters",
    [
        {"n_averaged": torch.tensor(5)},
        {"n_averaged": 5},
        {"module.norm.num_batches_tracked": torch.tensor(3)},
        {"step": 7, "decay": 0.999},
        {"module.model.enc.8x8_conv.num_batches_tracked": torch.tensor(3)},
    ],
)
def test_counters_are_passed_over_and_named(tmp_path: Path, tiny_bundle: Bundle, counters: State) -> None:
    path = saved(tmp_path / "x.pt", state_of(tiny_bundle, "module.") | counters)
    check_is_whole(path, tiny_bundle)
    left_out = translate(choose_network(read_checkpoint(path), None)).left_out
    assert [name.rpartition(".")[2] for name in left_out] == [name.rpartition(".")[2] for name in counters]


def test_a_number_that_is_no_counter_is_not_passed_over(tmp_path: Path, tiny_bundle: Bundle) -> None:
    path = saved(tmp_path / "x.pt", state_of(tiny_bundle, "module.") | {"module.temperature": torch.ones(())})
    with pytest.raises(FileFormatError, match=r"holds weights that are not its own.*temperature"):
        translate(choose_network(read_checkpoint(path), None))


def test_fastgens_file_is_read(tmp_path: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    nets = {"net": state_of(tiny_bundle), "fake_score": state_of(tiny_bundle, scale=2.0), "discriminator": {"w": torch.ones(2)}}
    moments = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    path = saved(tmp_path / "0001.pth", {"model": nets, "optimizer": {"net_optimizer": moments}, "iteration": 3})
    assert [network.name for network in read_checkpoint(path).networks] == ["net", "fake_score", "discriminator"]
    check_is_whole(path, tiny_bundle)
    check_is_whole(path, tiny_bundle, "fake_score", 2.0)
    assert cli("import", path, "--out", tmp_path / "b")[0] == 0


def test_lightnings_file_holds_networks_by_their_own_names(tmp_path: Path, tiny_bundle: Bundle) -> None:
    states = state_of(tiny_bundle, "net.") | state_of(tiny_bundle, "net_ema.", 3.0)
    path = saved(tmp_path / "x.ckpt", {"state_dict": states, "epoch": 3, "pytorch-lightning_version": "2.5"})
    assert [network.name for network in read_checkpoint(path).networks] == ["net", "net_ema"]
    check_is_whole(path, tiny_bundle, None, 3.0)  # the average
    check_is_whole(path, tiny_bundle, "net")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.dat", "model"])
def test_a_checkpoint_is_known_by_its_content(tmp_path: Path, tiny_bundle: Bundle, cli: Cli, name: str) -> None:
    path = saved(tmp_path / name, state_of(tiny_bundle))
    code, output, _ = cli("inspect", path)
    assert (code, output.startswith("checkpoint: state dict")) == (0, True)
    for command in (["data", "check"], ["data", "prepare", "--out", tmp_path / "x.zip"], ["evaluate", "--reference", "digits"]):
        code, output, errors = cli(*command, path)
        said = "not a data set but a checkpoint, which 'uni-instruct inspect' and 'import' take"
        assert (code, said in output + errors) == (2, True)


def test_data_named_as_a_checkpoint_are_data(tmp_path: Path, cli: Cli) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 4, 4, 1), np.uint8))
    (tmp_path / "x.npz").rename(tmp_path / "x.pt")
    assert cli("inspect", tmp_path / "x.pt")[1].startswith("data set: x")


def test_inspect_does_not_recommend_what_it_has_just_refused(tmp_path: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    foreign = saved(tmp_path / "foreign.pt", {"w": torch.ones(2)})
    output = cli("inspect", foreign)[1]
    assert "imported: no network of this file can be imported" in output
    assert "next:" not in output
    mixed = saved(tmp_path / "mixed file.pt", {"ema": {"w": torch.ones(2)}, "net": state_of(tiny_bundle)})
    output = cli("inspect", mixed)[1]
    assert f"next: uni-instruct import '{mixed}' --network net --out BUNDLE" in output
    code, output, _ = cli("import", mixed, "--network", "net", "--out", tmp_path / "my bundle", "--as", "generator")
    assert (code, f"next: uni-instruct serve '{tmp_path / 'my bundle'}'" in output) == (0, True)
    assert json.loads(cli("inspect", mixed, "--json")[1])["networks"][0]["error"]
