"""Files of other shapes: weights in several files, networks deep in dicts or beside other modules, settings beside weights."""

import argparse
import json
import pathlib
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from builders.state_dicts import State, check_is_whole, saved, state_of
from uni_instruct.bundle import Bundle
from uni_instruct.checkpoints.checkpoint import read_checkpoint
from uni_instruct.checkpoints.import_bundle import choose_network, open_or_import
from uni_instruct.checkpoints.state_dict_adapter import translate
from uni_instruct.errors import FileFormatError

Cli = Callable[..., tuple[int, str, str]]


def sharded(folder: Path, state: State, *, safetensors: bool = True) -> Path:
    """The weights in two files, and the index of both."""
    stem, suffix = ("model", ".safetensors") if safetensors else ("pytorch_model", ".bin")
    names, places = list(state), {}
    for number in (1, 2):
        part = names[number - 1 :: 2]
        file = f"{stem}-0000{number}-of-00002{suffix}"
        (save_file if safetensors else torch.save)({name: state[name] for name in part}, folder / file)  # type: ignore[operator]
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_weights_in_several_files_are_read_by_their_index(
    tmp_path: Path, tiny_bundle: Bundle, cli: Cli, safetensors: bool, prefix: str
) -> None:
    index = sharded(tmp_path, state_of(tiny_bundle, prefix), safetensors=safetensors)
    check_is_whole(index, tiny_bundle)
    assert cli("inspect", index)[1].startswith("checkpoint: sharded weights, ")
    assert cli("import", index, "--out", tmp_path / "b")[0] == 0


def test_two_networks_of_one_index_are_kept_apart(tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index says names and files: of two trainings of one network it is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scales = []
    for scale in (1.0, 2.0):
        (tmp_path / str(scale)).mkdir()
        index = sharded(tmp_path / str(scale), state_of(tiny_bundle, scale=scale))
        scales.append(open_or_import(str(index), "teacher").weights()["model.map_layer0.weight"])
    assert np.allclose(scales[1], 2 * scales[0])


def test_a_part_alone_names_the_index(tmp_path: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    index = sharded(tmp_path, state_of(tiny_bundle))
    part = tmp_path / "model-00001-of-00002.safetensors"
    for command in (["inspect", part], ["import", part, "--out", tmp_path / "b"]):
        code, _, errors = cli(*command)
        said = f"{part.name} is part 1 of 2; give {index.name}, with all parts beside it"
        assert (code, said in errors) == (2, True), errors
    part.unlink()
    with pytest.raises(FileFormatError, match=r"names the part 'model-00001.*', which is not beside it; copy all parts"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["x"]}}', "[" * 100_000),
        *('{"weight_map": {"a": "../x.pt"}}', '{"weight_map": {"a": "/x"}}'),
    ],
)
def test_an_index_that_is_none_or_leads_elsewhere_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"is not an index of weights|names the part") as error:
        read_checkpoint(tmp_path / "model.safetensors.index.json")
    assert "\n" not in str(error.value)


def test_several_networks_of_a_safetensors_file_are_told_apart(tmp_path: Path, tiny_bundle: Bundle) -> None:
    """As in torch's files."""
    path = tmp_path / "x.safetensors"
    save_file(state_of(tiny_bundle, "net.") | state_of(tiny_bundle, "net_ema.", 3.0), path)
    assert [network.name for network in read_checkpoint(path).networks] == ["net", "net_ema"]
    check_is_whole(path, tiny_bundle, None, 3.0)


def test_networks_are_found_at_any_depth(tmp_path: Path, tiny_bundle: Bundle) -> None:
    value: State = {"c": state_of(tiny_bundle)}
    for name in "ba":
        value = {name: value, "step": 3}
    check_is_whole(saved(tmp_path / "x.pt", value), tiny_bundle)
    twice = {"state_dict": {"net": state_of(tiny_bundle)}, "ema": {"net": state_of(tiny_bundle, scale=2.0)}}
    path = saved(tmp_path / "twice.pt", twice)
    assert [network.name for network in read_checkpoint(path).networks] == ["state_dict.net", "ema.net"]
    check_is_whole(path, tiny_bundle, None, 2.0)


def test_other_modules_beside_a_network_are_no_part_of_it(tmp_path: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    """A loss or a metric that is a module of Lightning's has weights of its own."""
    others = {"inception.w": torch.ones(3), "val_loss.mean_value": torch.ones(()), "lpips.lin.weight": torch.ones(3, 3)}
    path = saved(tmp_path / "x.ckpt", {"state_dict": others | state_of(tiny_bundle, "net."), "epoch": 3})
    assert [network.name for network in read_checkpoint(path).networks] == ["net", "inception", "val_loss", "lpips"]
    check_is_whole(path, tiny_bundle)
    assert "network inception: bare weights, 3 values in 1 tensors of float32; cannot be imported" in cli("inspect", path)[1]


def test_weights_too_many_are_not_to_be_downloaded_again(tmp_path: Path, tiny_bundle: Bundle) -> None:
    path = saved(tmp_path / "x.pt", state_of(tiny_bundle) | {"temperature": torch.ones(3)})
    with pytest.raises(FileFormatError, match=r"not its own: temperature; save the state_dict of that network alone$"):
        translate(choose_network(read_checkpoint(path), None))
    check_is_whole(saved(tmp_path / "alone.pt", state_of(tiny_bundle)), tiny_bundle)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["state_dict", "ema_state_dict"], "ema_state_dict"),
        (["generator", "ema_generator"], "ema_generator"),
        (["net", "averaged_model"], "averaged_model"),
        (["teacher", "student"], "student"),
        (["discriminator", "generator"], "generator"),
        (["fake_score", "net"], "net"),
        (["D", "G", "G_ema"], "G_ema"),
        (["schema", "net"], "schema"),
        (["fake_score"], "fake_score"),
    ],
)
def test_the_average_is_chosen_by_any_name(tmp_path: Path, tiny_bundle: Bundle, names: list[str], chosen: str) -> None:
    path = saved(tmp_path / "x.pt", {name: state_of(tiny_bundle) for name in names})
    assert choose_network(read_checkpoint(path), None).name == chosen


def test_settings_beside_weights_are_read_without_running_anything(tmp_path: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    within = {"shape": torch.Size([1, 2]), "device": torch.device("cuda:1"), "cpu": torch.device("cpu")}
    args = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/a/b"), data=pathlib.PurePosixPath("c/d"), **within)
    path = saved(tmp_path / "x.pt", {"model": state_of(tiny_bundle), "args": args, "more": types.SimpleNamespace(seed=3)})
    check_is_whole(path, tiny_bundle)
    facts = json.loads(cli("inspect", path, "--json")[1])["facts"]
    assert facts["args"] == {
        "class_name": "Namespace",
        "lr": 0.1,
        "out": "/a/b",
        "data": "c/d",
        "shape": [1, 2],
        "device": "cuda:1",
        "cpu": "cpu",
    }
    assert facts["more"]["seed"] == 3


def other_folders(folder: Path, bundle: Bundle) -> dict[str, Path]:
    """Folders as other projects leave them; the file in each that holds the weights."""
    state = state_of(bundle)
    files = {
        "diffusers": folder / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors",
        "DeepSpeed": folder / "DeepSpeed" / "global_step3" / "mp_rank_00_model_states.pt",
        "transformers": folder / "transformers" / "pytorch_model.bin",
    }
    for file in files.values():
        file.parent.mkdir(parents=True)
    save_file(state, files["diffusers"])
    saved(files["DeepSpeed"], {"module": state})
    saved(files["transformers"], state)
    (folder / "diffusers" / "model_index.json").write_text("{}")
    (folder / "DeepSpeed" / "latest").write_text("global_step3")
    (folder / "transformers" / "config.json").write_text("{}")
    (folder / "sharded").mkdir()
    return files | {"sharded": sharded(folder / "sharded", state)}


@pytest.mark.parametrize("kind", ["diffusers", "DeepSpeed", "transformers", "sharded"])
def test_a_folder_of_another_project_names_the_file_to_give(tmp_path: Path, tiny_bundle: Bundle, cli: Cli, kind: str) -> None:
    file = other_folders(tmp_path, tiny_bundle)[kind]
    for command in (["inspect"], ["import", "--out", tmp_path / "b"]):
        code, _, errors = cli(*command, tmp_path / kind)
        assert (code, len(errors.splitlines())) == (2, 1)
        assert f"'uni-instruct import {file} --out BUNDLE'" in errors
    assert cli("import", file, "--out", tmp_path / "b")[0] == 0


@pytest.mark.parametrize("command", ["generate {} --seeds 0 --out x", "export {} --to onnx", "benchmark {}", "card {}"])
def test_weights_in_place_of_a_bundle_are_answered_with_the_import(
    tmp_path: Path, tiny_bundle: Bundle, cli: Cli, command: str
) -> None:
    path = saved(tmp_path / "pytorch_model.bin", state_of(tiny_bundle))
    for source in (path, tmp_path):
        code, _, errors = cli(*command.format(source).split())
        said = f"is not a bundle (it has no config.json); import the weights there: 'uni-instruct import {path} --out BUNDLE'"
        assert (code, said in errors) == (2, True), errors


def test_a_folder_without_weights_is_said_to_be_none(tmp_path: Path, cli: Cli) -> None:
    assert "is not a file; give the path of a checkpoint" in cli("import", tmp_path, "--out", tmp_path / "b")[2]
