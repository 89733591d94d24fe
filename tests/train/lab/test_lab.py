"""`uni-instruct lab`: every variant is trained as `train` would, from one teacher; the page says what the logs say."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from builders.machine import run_cli
from builders.plans import TINY
from builders.runs import start_cli, wait_for_step
from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.train.lab.experiments import parse_variants, plan_lab, resolve_lab
from uni_instruct.train.recipe import parse_recipe, read_yaml
from uni_instruct.train.report.records import read_history
from uni_instruct.train.run_lock import is_locked

Cli = Callable[..., tuple[int, str, str]]
SMALL = (*TINY, "loop.samples=100", "loop.log_kimg=0.016", "distillation.evaluate_kimg=0.08", "teacher.steps=4")
METHODS = "sid, sid alpha=0.5, dmd2 critic_updates=1"


def test_variants_are_methods_with_changes_on_top(tmp_path: Path) -> None:
    lab = plan_lab("digits", [*SMALL, "alpha=0.7"], parse_variants([METHODS]), [3, 5], tmp_path)
    assert [(t.variant.name, t.seed) for t in lab.experiments][:3] == [("sid", 3), ("sid", 5), ("sid alpha=0.5", 3)]
    assert [t.recipe.objective.alpha for t in lab.experiments[::2]] == [0.7, 0.5, 0.7]
    assert [t.recipe.objective.family for t in lab.experiments[::2]] == ["expanded", "expanded", "integral"]
    assert {t.recipe.loop.seed for t in lab.experiments} == {3, 5}
    assert len({t.folder for t in lab.experiments}) == 6
    assert {t.recipe.teacher.bundle for t in lab.experiments} == {str(tmp_path / "teacher-run" / "teacher")}


def test_all_trials_have_the_same_arithmetic(tmp_path: Path) -> None:
    lab = resolve_lab(plan_lab("digits", SMALL, parse_variants([METHODS]), [0], tmp_path))
    assert lab.teacher is not None
    loops = [lab.teacher.loop, *(t.recipe.loop for t in lab.experiments)]
    assert len({(loop.precision, loop.channels_last, loop.extractor) for loop in loops}) == 1
    assert "auto" not in (loops[0].precision, loops[0].channels_last, loops[0].extractor)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["sidd"], "--methods 'sidd' is unknown; choose one of diff-instruct"),
        ([" , "], "--methods names no method"),
        (["sid alpha"], "'alpha' after 'sid' has no value; write key=value"),
        (["sid", "sid"], "--methods has 'sid' twice"),
    ],
)
def test_wrong_methods_are_refused(methods: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        parse_variants(methods)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "sid, di++"), "method 'di++' needs a reward"),
        (("--methods", "sid alpha=high"), "recipe key 'objective.alpha' is 'high'"),
        (("--methods", "sid", "loop.metric=none"), "a lab compares scores, but loop.metric is none"),
        (("--methods", "sid", "--seeds", "0-999999"), "more than 1000 trainings"),
        (("--methods", "sid", "teacher.bundle=nowhere"), "there is no bundle nowhere"),
    ],
)
def test_what_would_fail_is_refused_before_anything_is_trained(
    cli: Cli, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, _, errors = cli("lab", "digits", *SMALL, "--out", tmp_path / "lab", *words)
    assert (code, message in errors) == (2, True), errors
    assert not (tmp_path / "lab" / "experiments").exists()
    assert not (tmp_path / "lab" / "teacher-run").exists()


def test_a_folder_of_somebodys_is_not_replaced_by_the_labs(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.tex").write_text("mine")
    code, _, errors = cli("lab", "digits", *SMALL, "--out", tmp_path, "--methods", "sid")
    assert (code, errors) == (2, f"error: {tmp_path}/report would be replaced, and no training made it; choose another --out\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lab_from_start_to_page(tmp_path: Path) -> None:
    out = tmp_path / "a lab"
    words = ("lab", "digits", *SMALL, "--methods", "sid, sid alpha=0.5", "--seeds", "0-1", "--jobs", "2", "--out", out)
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    experiments = sorted((out / "experiments").glob("*/recipe.yaml"))
    assert len(experiments) == 4
    teacher = Bundle.open(out / "teacher-run" / "teacher").weights_sha256
    generators = [Bundle.open(file.parent / "generator") for file in experiments]
    assert {bundle.spec.provenance["teacher_sha256"] for bundle in generators} == {teacher}
    assert not (out / "teacher-run" / "generator").exists()

    entries = json.loads((out / "lab.json").read_text())
    for entry in entries["variants"]:
        found = []
        for file in experiments:
            recipe = parse_recipe(read_yaml(file))
            if recipe.objective.method == entry["method"] and all(
                f"alpha={recipe.objective.alpha:g}" == s for s in entry["settings"] if "alpha" in s
            ):
                best = read_history(file.parent)["generator"].best("FD")
                assert best is not None
                found.append(best.value)
        assert set(entry["scores"][entries["metric"]]) <= set(found)
    means = [statistics.fmean(entry["scores"][entries["metric"]]) for entry in entries["variants"]]
    assert means == sorted(means)

    page = (out / "lab.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    before = {file: file.stat().st_mtime_ns for file in (out / "experiments").rglob("model.safetensors")}
    assert run_cli(*words).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_a_lab_that_is_stopped_takes_its_trainings_with_it(tmp_path: Path) -> None:
    out = tmp_path / "lab"
    process = start_cli("lab", "digits", *SMALL, "distillation.duration_kimg=50", "--methods", "sid", "--out", str(out))
    run = out / "experiments" / "sid-seed0"
    wait_for_step(run, "generator", 4, process)
    process.terminate()
    process.wait(timeout=120)
    assert process.returncode == 130
    assert is_locked(run) is False
    assert (run / "state" / "generator.pt").exists()


def test_a_teacher_alone_is_gone_on_from(cli: Cli, tmp_path: Path) -> None:
    words = ("train", "digits", *SMALL, "loop.report=false", "--out", tmp_path / "run")
    code, output, errors = cli(*words, "--teacher-only")
    assert code == 0, errors
    assert output.startswith("teacher: ")
    assert not (tmp_path / "run" / "generator").exists()
    teacher = Bundle.open(tmp_path / "run" / "teacher").weights_sha256
    assert cli(*words)[0] == 0
    assert Bundle.open(tmp_path / "run" / "generator").spec.provenance["teacher_sha256"] == teacher
    code, _, errors = cli(*words, f"teacher.bundle={tmp_path / 'run' / 'teacher'}", "--teacher-only")
    assert (code, errors.count("\n")) == (2, 1)
    assert "leave out teacher.bundle or --teacher-only" in errors
