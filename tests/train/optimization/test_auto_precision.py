"""`auto` of precision and memory format: what is measured, what is chosen, and that a run keeps it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from builders.plans import tiny_plan
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.train.config import LoopConfig
from uni_instruct.train.optimization import auto_precision as precision
from uni_instruct.train.optimization.auto_precision import PrecisionChoice, exact, resolve_precision, resolve_precision_for_run

EXACT, ROWS, HALF = PrecisionChoice("32-true", False), PrecisionChoice("32-true", True), PrecisionChoice("bf16-mixed", True)
SPEC = tiny_plan().teacher_spec


def timed(monkeypatch: pytest.MonkeyPatch, times: dict[PrecisionChoice, float]) -> list[PrecisionChoice]:
    """Has every trial take the time that is given; returns the list of what is tried."""
    tried: list[PrecisionChoice] = []

    def step_s(spec: object, way: PrecisionChoice, images: int) -> float:
        tried.append(way)
        return times[way]

    monkeypatch.setattr(precision, "_step_s", step_s)
    monkeypatch.setattr(precision, "_choices", lambda: list(times))
    return tried


def way_of(loop: LoopConfig) -> PrecisionChoice:
    return PrecisionChoice(loop.precision, bool(loop.channels_last))


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({EXACT: 1.0, ROWS: 0.9, HALF: 0.3}, HALF),
        ({EXACT: 1.0, ROWS: 0.5, HALF: 0.6}, ROWS),
        ({EXACT: 1.0, ROWS: 0.9, HALF: 0.9}, EXACT),  # not worth it
        ({EXACT: 0.1, ROWS: 0.9, HALF: 0.9}, EXACT),
    ],
)
def test_the_fastest_is_taken_where_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, times: dict[PrecisionChoice, float], chosen: PrecisionChoice
) -> None:
    timed(monkeypatch, times)
    assert way_of(resolve_precision(LoopConfig(), SPEC, 8, shown=False)) == chosen


def test_what_is_said_stays_and_only_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {EXACT: 1.0, ROWS: 0.4, HALF: 0.1})
    assert way_of(resolve_precision(LoopConfig(precision="32-true"), SPEC, 8, shown=False)) == ROWS
    assert set(tried) == {EXACT, ROWS}
    tried.clear()
    assert way_of(resolve_precision(LoopConfig(precision="bf16-mixed"), SPEC, 8, shown=False)) == HALF
    assert way_of(resolve_precision(LoopConfig(precision="32-true", channels_last=False), SPEC, 8, shown=False)) == EXACT
    assert tried == []
    assert way_of(exact(LoopConfig())) == EXACT


def test_the_networks_own_step_is_timed_within_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    loop = resolve_precision(LoopConfig(), SPEC, 8)
    assert loop.precision in ("32-true", "bf16-mixed", "16-mixed")
    assert isinstance(loop.channels_last, bool)
    assert torch.equal(torch.get_rng_state(), before)
    said = capsys.readouterr().err
    assert said.startswith("precision: measuring the fastest: 0/")
    assert f"{way_of(loop)} (images/s:" in said


def test_a_run_is_settled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, {EXACT: 1.0, HALF: 0.1})
    first = resolve_precision_for_run(LoopConfig(), SPEC, 8, tmp_path)
    assert way_of(first) == HALF
    tried.clear()
    monkeypatch.setattr(precision, "_step_s", lambda *_: pytest.fail("measured again"))
    assert resolve_precision_for_run(LoopConfig(), SPEC, 8, tmp_path) == first
    assert (
        way_of(resolve_precision_for_run(replace(first, precision="32-true", channels_last="auto"), SPEC, 8, tmp_path)) == ROWS
    )
    assert tried == []


def test_a_resumed_run_keeps_what_its_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {EXACT: 1.0, HALF: 0.1})
    (tmp_path / "recipe.yaml").write_text("name: x\ndata: digits\nloop: {precision: 32-true, channels_last: true}\n")
    assert way_of(resolve_precision_for_run(LoopConfig(), SPEC, 8, tmp_path)) == ROWS


def test_a_damaged_note_is_told_and_mended_by_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {EXACT: 1.0, HALF: 0.1})
    note = tmp_path / "state" / "fastest.json"
    note.parent.mkdir()
    note.write_text('{"precision": ')
    with pytest.raises(FileFormatError, match=r"fastest\.json cannot be read; delete that file and run the same command again"):
        resolve_precision_for_run(LoopConfig(), SPEC, 8, tmp_path)
    note.unlink()
    assert way_of(resolve_precision_for_run(LoopConfig(), SPEC, 8, tmp_path)) == HALF


def test_a_later_process_takes_what_the_first_has_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(precision, "TIMEOUT_S", 0.2)
    with pytest.raises(RequestError, match=r"fastest\.json was not written by rank 0 within .* s; give --out a folder"):
        resolve_precision_for_run(LoopConfig(), SPEC, 8, tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "fastest.json").write_text(json.dumps({"precision": "bf16-mixed", "channels_last": True}))
    assert way_of(resolve_precision_for_run(LoopConfig(), SPEC, 8, tmp_path)) == HALF


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loop.precision=fp8", "loop.precision 'fp8' is unknown; choose one of auto, 32-true, bf16-mixed, 16-mixed"),
        ("loop.channels_last=maybe", "loop.channels_last is 'maybe'; give true, false or auto"),
        ("loop.channels_last=1", "recipe key 'loop.channels_last' is 1; give true or false"),
        ("loop.extractor=dino", "loop.extractor 'dino' is unknown; choose one of auto, inception, classifier"),
    ],
)
def test_what_is_none_is_refused(cli: Callable[..., tuple[int, str, str]], change: str, message: str) -> None:
    code, _, said = cli("train", "digits", "--out", "run", "--set", change)
    assert (code, said.strip()) == (2, f"error: {message}")


def test_trials_take_one_thread_and_leave_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def step_s(spec: object, way: PrecisionChoice, images: int) -> float:
        threads.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(precision, "_step_s", step_s)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        resolve_precision(LoopConfig(), SPEC, 8, shown=False)
        assert set(threads) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
