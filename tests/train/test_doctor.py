"""`uni-instruct doctor`: each thing that spoils a run is found before it starts, and a run that can start is told so."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError

Cli = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("offline")


def findings(cli: Cli, *arguments: str | Path) -> tuple[int, dict[str, dict]]:
    code, out, errors = cli("doctor", *arguments, "--json")
    assert out, errors
    return code, {finding["subject"]: finding for finding in json.loads(out)}


def test_a_run_that_can_start_is_well(cli: Cli, tmp_path: Path) -> None:
    code, found = findings(cli, "digits", "--out", tmp_path / "runs" / "new")
    assert code == 0
    assert list(found) == ["data", "teacher", "recipe", "evaluation", "run", "devices", "memory", "disk"]
    assert all(finding["ok"] for finding in found.values())
    assert "1,024 of 1,797 images of 8x8x1 read, 10 classes of 174 to 183 images" in found["data"]["words"]
    assert str(tmp_path) in found["disk"]["words"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "subject", "words"),
    [
        (["data=nowhere"], "data", "there is no data set nowhere"),
        (["data={grey}"], "data", "64 images of 'grey' all have the same single colour; give a data set of real pictures"),
        (["data={gap}"], "data", "1 of the 3 classes of 'gap' have no image"),
        (["teacher={random}"], "teacher", "give a teacher that was trained on this data, with pixels from -1 to 1"),
        (["teacher=nowhere"], "teacher", "there is no bundle nowhere"),
        (["teacher={random}", "data=fashion-mnist"], "recipe", "makes images of shape [1, 8, 8]"),
        (["method=di++", "reward=nowhere:f"], "recipe", "reward 'nowhere:f' cannot be imported"),
        (["precision=16-mixed"], "devices", "loop.precision 16-mixed needs a GPU, and this machine has none"),
        (
            ["--devices", "3"],
            "devices",
            "teacher.batch 128 cannot be divided among 3 processes; --set teacher.batch=129, or --devices 2",
        ),
        (["network.model_channels=4096", "distillation.batch=8192"], "memory", "lower distillation.micro_batch"),
        (["distillation.ema_power_std=[0.05, 0.1]", "snapshot_kimg=1e-5"], "disk", "raise loop.snapshot_kimg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_spoil_a_run_is_found(
    cli: Cli, tmp_path: Path, tiny_teacher: Bundle, arguments: list[str], subject: str, words: str
) -> None:
    torch = pytest.importorskip("torch")
    if subject == "devices" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    np.savez(tmp_path / "grey.npz", arr_0=np.full((64, 8, 8, 1), 7, np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "gap.npz", arr_0=noise, class_ids=np.array([0, 2, 2, 0]))
    given = {name: tmp_path / f"{name}.npz" for name in ("grey", "gap")} | {"random": tiny_teacher.path}
    code, found = findings(cli, "digits", *[argument.format(**given) for argument in arguments])
    assert code == 2
    assert not found[subject]["ok"]
    assert words in found[subject]["words"]


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_found(cli: Cli, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    code, found = findings(cli, "digits", "--out", str(tmp_path / out))
    assert (code, found["disk"]["ok"]) == (2, False)
    assert f"nothing can be written into {tmp_path / 'file'}; choose another --out" in found["disk"]["words"]


def test_what_train_would_find_in_the_folder_is_found(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from uni_instruct.train.preflight import CHECKS, Preflight
    from uni_instruct.train.recipe import load_recipe

    run = tmp_path / "run"
    preflight = Preflight(load_recipe("digits"), run, 1)
    assert CHECKS["run"](preflight) == f"{run} contains no run yet"
    (run / "state").mkdir(parents=True)
    torch.save({"step": 3}, run / "state" / "teacher.pt")
    (run / "state" / "teacher.json").write_text('{"step": 3}')
    (run / "recipe.yaml").write_text("name: digits\ndata: digits\nnetwork: {model_channels: 48}\n")
    with pytest.raises(RequestError, match=r"with network\.model_channels=48, which a resumed run cannot change to 32"):
        CHECKS["run"](preflight)
    (run / "recipe.yaml").write_text(yaml.safe_dump(load_recipe("digits").to_dict()))
    assert CHECKS["run"](preflight) == f"{run} contains a run that will be resumed: teacher at step 3"
    (run / "state" / "teacher.pt").write_bytes(b"PK")
    with pytest.raises(RequestError, match=r"teacher.pt cannot be read; delete it to train that stage again"):
        CHECKS["run"](preflight)
