"""What a run notes beside its weights, damaged in any way: never a traceback, and the run goes on or says what helps."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.data import open_dataset
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.train.config import LoopConfig
from uni_instruct.train.data_fingerprint import check_same_data, saved_classes
from uni_instruct.train.optimization.auto_precision import resolve_precision_for_run
from uni_instruct.train.pipeline import train
from uni_instruct.train.recipe import load_recipe

Cli = Callable[..., tuple[int, str, str]]
SHORT = [
    "network.model_channels=16",
    "distillation.batch=32",
    "distillation.duration_kimg=0.064",
    "critic_warmup_kimg=0.032",
    "distillation.decay_kimg=0",
    "metric=none",
    "loop.grid=4",
    "loop.log_kimg=0.032",
    "loop.report=false",
    "trackers=[]",
]
NOTES = ("state/data.json", "state/generator.json", "time.json", "run.lock", "log.jsonl")
DAMAGES: dict[str, bytes] = {
    "nested deeply": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "endless": b'{"step": 1e400, "stage": "generator", "kimg": 1e400, "generator": {"training": 1e400}}',
    "no text": b"\xff\xfe\x00",
    "another kind": b"[1]",
    "other keys": b'{"a": {"b": 1}}',
    "wrong values": b'{"step": "x", "stage": "generator", "kimg": [1], "images": {}, "class_names": 5, "generator": 5}',
    "a warning of nobody": b'{"stage": "generator", "step": null, "warning": {}}',
    "nothing": b"",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_teacher: Path) -> tuple[list[str], Path]:
    settings, out = [*SHORT, f"teacher={digits_teacher}"], tmp_path_factory.mktemp("notes") / "run"
    train(load_recipe("digits", settings), out)
    return settings, out


def test_the_notes_are_those_that_a_run_writes(run: tuple[list[str], Path]) -> None:
    written = {str(path.relative_to(run[1])) for path in run[1].rglob("*") if path.suffix in (".json", ".jsonl", ".lock")}
    assert {name for name in written if not name.startswith("generator/")} == set(NOTES)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_notes_end_no_run(cli: Cli, tmp_path: Path, run: tuple[list[str], Path], damage: str) -> None:
    settings, out = run[0], tmp_path / "run"
    shutil.copytree(run[1], out)
    for note in NOTES[1:]:
        kept = (out / note).read_bytes() if note == "log.jsonl" else b""
        (out / note).write_bytes(kept + DAMAGES[damage] + b"\n")
    for command in (["--status"], ["--status", "--json"]):
        code, _, errors = cli("train", out, *command)
        assert (code, errors) == (0, ""), errors
    code, _, errors = cli(
        "train", "digits", "--out", out, "--set", *settings, "distillation.duration_kimg=0.096", "report=true"
    )
    assert code == 0, errors[-600:]
    assert (out / "report.md").is_file(), errors[-600:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_of_the_data_is_noted_anew_or_one_line(tmp_path: Path, damage: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "generator.pt").touch()
    (tmp_path / NOTES[0]).write_bytes(DAMAGES[damage])
    assert saved_classes(tmp_path) == ()
    with suppress(RequestError):  # a note of other data
        check_same_data(tmp_path, open_dataset("digits"), write=True)
        assert json.loads((tmp_path / NOTES[0]).read_text())["images"] == 1797


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_of_what_is_fastest_is_one_line(tmp_path: Path, tiny_bundle: Bundle, damage: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "fastest.json").write_bytes(DAMAGES[damage])
    with pytest.raises(FileFormatError, match=r"fastest.json cannot be read; delete that file and run the same command again"):
        resolve_precision_for_run(LoopConfig(), tiny_bundle.spec, 8, tmp_path)
