"""`uni-instruct evaluate`: the same images score the same in every form, and faults are one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.data import open_dataset, write_zip

Cli = Callable[..., tuple[int, str, str]]
FD = "FD(digits-classifier)"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own, with a classifier of few steps: good enough to be the same for all."""
    from uni_instruct.evaluate import classifier

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(classifier, "STEPS", 100)
        yield


def evaluated(cli: Cli, *arguments: str | Path) -> dict[str, Any]:
    code, out, err = cli("evaluate", *arguments, "--reference", "digits", "--json")
    assert code == 0, err
    facts: dict[str, Any] = json.loads(out)
    return facts


def test_a_bundle_and_its_images_in_every_form_score_the_same(cli: Cli, tiny_bundle: Bundle, tmp_path: Path) -> None:
    facts = evaluated(cli, tiny_bundle.path, "--seeds", "0-119")
    truth = facts["scores"]["generator"]["values"]
    assert set(truth) == {FD, "KD(digits-classifier)", "precision", "recall", "class_accuracy"}
    for name in ("folder", "images.zip", "images.npz"):
        assert cli("generate", tiny_bundle.path, "--seeds", "0-119", "--out", tmp_path / name)[0] == 0
        assert evaluated(cli, tmp_path / name)["scores"]["images"]["values"] == truth
    write_zip(open_dataset(tmp_path / "folder"), tmp_path / "prepared.zip")
    assert evaluated(cli, tmp_path / "prepared.zip")["scores"]["images"]["values"] == truth


def test_workers_and_sets_of_seeds_do_not_change_a_score(cli: Cli, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Two workers sum up what one process does, in its order; each set is what it is alone."""
    options = ["--metrics", "fd,class_accuracy,pr", "--batch", "64"]
    alone = evaluated(cli, tiny_bundle.path, "--seeds", "0-2399", "--sets", "2", *options)
    shared = evaluated(cli, tiny_bundle.path, "--seeds", "0-2399", "--sets", "2", "--workers", "2", *options)
    assert shared["scores"] == alone["scores"]
    generator = alone["scores"]["generator"]
    second = evaluated(cli, tiny_bundle.path, "--seeds", "1200-2399", *options)["scores"]["generator"]["values"]
    assert generator["by_set"][1] == second
    values = [values[FD] for values in generator["by_set"]]
    assert generator["values"][FD] == pytest.approx(np.mean(values))
    assert generator["spread"][FD] == pytest.approx(np.std(values, ddof=1))
    assert generator["least"][FD] == min(values)
    assert cli("generate", tiny_bundle.path, "--seeds", "1200-2399", "--out", tmp_path / "out.wds")[0] == 0
    images = evaluated(cli, tmp_path / "out.wds", "--workers", "1", *options)
    assert images["scores"]["images"]["values"] == second


def test_a_teacher_is_sampled_in_as_many_steps_as_asked_for(cli: Cli, tiny_bundle: Bundle, tiny_teacher: Bundle) -> None:
    options = ("--metrics", "fd", "--samples", "60", "--sets", "1")
    own = evaluated(cli, tiny_teacher.path, *options)["scores"]["generator"]
    three = evaluated(cli, tiny_teacher.path, *options, "--steps", "3")["scores"]["generator"]
    assert (own["steps"], three["steps"]) == (tiny_teacher.spec.steps, 3)
    assert own["values"] != three["values"]
    assert evaluated(cli, tiny_teacher.path, *options, "--steps", str(own["steps"]))["scores"]["generator"] == own
    # Workers open the bundle by themselves.
    assert evaluated(cli, tiny_teacher.path, *options, "--steps", "3", "--workers", "1")["scores"]["generator"] == three
    both = evaluated(cli, tiny_bundle.path, *options, "--teacher", tiny_teacher.path, "--steps", "3")["scores"]
    assert (both["generator"]["steps"], both["teacher"]["values"]) == (1, three["values"])
    code, out, _ = cli("evaluate", tiny_teacher.path, "--reference", "digits", *options, "--steps", "3")
    assert code == 0
    assert "in 3 steps (5 evaluations) on torch-fp32" in out


def test_teacher_and_student_are_scored_on_the_same_seeds(cli: Cli, tiny_bundle: Bundle, tiny_teacher: Bundle) -> None:
    options = ["--seed", "50", "--samples", "60", "--metrics", "fd,class_accuracy"]
    both = evaluated(cli, tiny_bundle.path, "--teacher", tiny_teacher.path, *options)
    student, teacher = (both["scores"][role]["values"] for role in ("generator", "teacher"))
    assert both["distance_to_teacher_ratio"] == pytest.approx(student[FD] / teacher[FD])
    assert (both["seeds"], both["scores"]["teacher"]["engine"]) == ("50-109", "torch-fp32")
    assert evaluated(cli, tiny_bundle.path, *options)["scores"]["generator"]["values"] == student
    assert evaluated(cli, tiny_teacher.path, *options)["scores"]["generator"]["values"] == teacher
    assert {"uni-instruct", "torch", "torch-fidelity", "numpy"} <= set(both["versions"])
    assert len(both["extractor"]["sha256"]) == 64

    code, out, _ = cli("evaluate", tiny_bundle.path, "--reference", "digits", "--teacher", tiny_teacher.path, *options)
    assert code == 0
    assert f"generator {FD}: {student[FD]:.4g}" in out
    assert f"teacher {FD}: {teacher[FD]:.4g}" in out
    assert f"distance to the reference: {student[FD] / teacher[FD]:.2f} times the teacher's" in out
    assert "FID" not in out


def test_saved_statistics_are_a_reference(cli: Cli, tiny_bundle: Bundle, tmp_path: Path) -> None:
    saved = tmp_path / "statistics.npz"
    options = ["--samples", "80", "--metrics", "fd"]
    first = evaluated(cli, tiny_bundle.path, *options, "--save-statistics", saved)
    code, out, _ = cli("evaluate", tiny_bundle.path, "--reference", saved, *options, "--json")
    second = json.loads(out)
    assert code == 0
    assert second["scores"] == first["scores"]
    assert second["reference"] == {"name": "digits", "samples": 1797}


def test_as_many_seeds_as_the_reference_has_images(cli: Cli, tiny_bundle: Bundle) -> None:
    assert evaluated(cli, tiny_bundle.path, "--metrics", "class_accuracy", "--sets", "1")["seeds"] == "0-1796"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--reference", "digits"], "there is no bundle and there are no images at nothing"),
        (["digits", "--reference", "nothing"], "there is no data set nothing"),
        (["digits", "--reference", "bad.npz"], "bad.npz has mu [3] and sigma [2, 2]"),
        (["digits", "--reference", "small.npz"], "small.npz has 3 features, but inception-v3 has 2048"),
        (["digits", "--reference", "digits", "--metrics", "fd,fid"], "metric 'fid' is unknown"),
        (["digits", "--reference", "digits", "--metrics", "is"], "metric 'is' cannot be measured"),
        (["digits", "--reference", "digits", "--samples", "0"], "0 is not in the range"),
        (["digits", "--reference", "digits", "--samples", "99999999999"], "99999999999 is not in the range"),
        (["wide.npz", "--reference", "digits", "--seeds", "0-9"], "--seeds applies to bundles only, but images were given"),
        (["wide.npz", "--reference", "digits", "--teacher", "x"], "--teacher applies to bundles only, but images were given"),
        (["digits", "--reference", "digits", "--steps", "3"], "is a one-step generator and cannot be sampled in 3 steps"),
        (["wide.npz", "--reference", "digits", "--steps", "3"], "--steps applies to bundles only, but images were given"),
        (["digits", "--reference", "digits", "--extractor", "dino"], "'dino' is not one of"),
        (["digits", "--reference", "digits", "--save-statistics", "x.txt"], "x.txt is not the name of an .npz"),
        (["BUNDLE", "--reference", "digits", "--seeds", "x"], "seeds 'x' cannot be read"),
        (["BUNDLE", "--reference", "digits", "--seeds", "0-9", "--samples", "5"], "--seeds already says which"),
        (["BUNDLE", "--reference", "digits", "--seeds", "0-2"], "3 images are too few"),
        (["BUNDLE", "--reference", "digits", "--seeds", "0-9", "--sets", "3"], "10 seeds cannot be divided into 3 equal sets"),
        (["wide.npz", "--reference", "digits", "--sets", "3"], "--sets applies to bundles only, but images were given"),
        (["BUNDLE", "--reference", "digits", "--engine", "onnx"], "has no onnx engine"),
        (["BUNDLE", "--reference", "digits", "--engine", "abacus"], "engine 'abacus' is unknown"),
        (["BUNDLE", "--reference", "digits", "--teacher", "nothing"], "there is no bundle nothing"),
        (["BUNDLE", "--reference", "wide.npz"], "cannot be compared with a reference of [1, 4, 8]"),
    ],
)
def test_faults_are_one_line(
    cli: Cli,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez("small.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    np.savez("wide.npz", arr_0=np.zeros((9, 4, 8, 1), np.uint8), class_ids=np.arange(9) % 2)
    code, out, err = cli("evaluate", *(str(tiny_bundle.path) if word == "BUNDLE" else word for word in arguments))
    last = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err


def test_bundles_and_runs_are_compared_as_their_results_are(cli: Cli, tiny_bundle: Bundle, tmp_path: Path) -> None:
    other = random_bundle(tmp_path / "run" / "generator", seed=5)
    scored = ["--samples", "40", "--sets", "3"]
    for name, bundle in (("a", tiny_bundle), ("b", other)):
        (tmp_path / name).write_text(json.dumps(evaluated(cli, bundle.path, "--metrics", "fd", *scored)))
    truth = json.loads(cli("compare", tmp_path / "a", tmp_path / "b", "--json")[1])
    sides = (tiny_bundle.path, tmp_path / "run")
    code, out, err = cli("compare", *sides, "--reference", "digits", "--samples", "40", "--json")
    assert code == 0, err
    assert json.loads(out) == truth
    assert truth["metric"] == FD
    assert "training again changes FID about 3.2 times as much as other seeds do" in truth["note"]
    mixed = cli("compare", tmp_path / "a", tmp_path / "run", "--reference", "digits", *scored, "--json")
    assert json.loads(mixed[1]) == truth


def test_several_trainings_of_either_side_are_bundles_too(cli: Cli, tiny_bundle: Bundle, tmp_path: Path) -> None:
    others = [random_bundle(tmp_path / str(seed), seed=seed).path for seed in (5, 6, 7)]
    words = (f"{tiny_bundle.path},{others[0]}", f"{others[1]},{others[2]}", "--reference", "digits", "--samples", "40")
    code, out, err = cli("compare", *words, "--metric", "recall")
    assert code == 0, err
    assert "A: recall " in out
    assert "2 trainings" in out
    assert "note:" not in out
    code, _, err = cli("compare", f"{others[0]},{others[0]}", others[1], "--reference", "digits")
    assert (code, "contains the same weights twice; give each training once" in err) == (2, True), err
    code, _, err = cli("compare", others[0], others[1])
    assert (code, err.strip()) == (2, "error: bundles are scored against a reference; give --reference DATA")
    code, _, err = cli("compare", others[0], others[1], "--reference", "digits", "--metric", "beauty")
    assert (code, "metric 'beauty' is unknown; choose from fd, kd" in err) == (2, True), err
