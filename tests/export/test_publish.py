"""publish: half precision where no pixel shows it, an engine of the same weights, and a card that is true."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from PIL import Image

from builders.bundles import ONNX, random_bundle
from uni_instruct.bundle import CARD, CONFIG, SAMPLES, WEIGHTS, Bundle
from uni_instruct.engine import TORCH, open_engine
from uni_instruct.engines.record import EngineRecord
from uni_instruct.errors import RequestError
from uni_instruct.export import onnxruntime as onnxruntime_target
from uni_instruct.export.card import published_card
from uni_instruct.export.half_precision import CHECKED_IMAGES
from uni_instruct.export.publish import publish, store, without_folders
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.networks import flops
from uni_instruct.noise import noise
from uni_instruct.system.progress import progress

Cli = Callable[..., tuple[int, str, str]]
SEEDS = list(range(5000, 5300))
RECIPE = {"name": "tiny", "data": "/home/somebody/data.zip", "loop": {"seed": 3}, "network": {"channel_mult": [1, 2]}}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The generator of a run's folder, trained on data of somebody's machine."""
    tiny = random_bundle(tmp_path_factory.mktemp("run") / "tiny", seed=1)
    spec = replace(tiny.spec, provenance={"recipe": RECIPE, "data": "noise"}, licence="MIT")
    return Bundle.write(tiny.path.parent / "generator", spec, tiny.weights(), "# tiny\n")


@pytest.fixture(scope="module")
def published(original: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("published") / "tiny"
    publish(original.path.parent, out)
    return Bundle.open(out)


def images_of(bundle: Bundle, kind: str) -> np.ndarray:
    return generate_images(open_engine(bundle, kind), SEEDS, resolve_class_ids(bundle.spec, SEEDS)).astype(int)


def test_half_weights_move_no_pixel_by_more_than_a_level(original: Bundle, published: Bundle) -> None:
    assert (original.stored_precision(), published.stored_precision()) == ("fp32", "fp16")
    assert (published.path / WEIGHTS).stat().st_size < 0.6 * (original.path / WEIGHTS).stat().st_size
    for name, array in original.weights().items():
        expected = array.astype(np.float16).astype(np.float32) if array.ndim > 1 else array
        np.testing.assert_array_equal(published.weights()[name], expected)
    reference = published.reference()
    assert reference is not None
    outputs = open_engine(published, TORCH).outputs(reference.noise(published.spec), reference.class_ids)
    np.testing.assert_array_equal(outputs.images, reference.images)  # of the weights as they are stored
    # On seeds that publish did not look at.
    levels = np.abs(images_of(published, "torch") - images_of(original, "torch"))
    assert levels.max() == 1
    rounding = published.spec.provenance["published"]
    assert rounding["weights_sha256"] == original.weights_sha256
    assert (rounding["images"], rounding["largest_difference"], rounding["precision"]) == (CHECKED_IMAGES, 1, "fp16")
    assert rounding["changed_pixels"] == pytest.approx((levels > 0).mean(), rel=0.2)


def test_the_engine_has_the_rounded_weights_in_half_the_bytes(published: Bundle, exported_bundle: Bundle) -> None:
    record = EngineRecord.read(published.engine_folder(ONNX))
    full = EngineRecord.read(exported_bundle.engine_folder(ONNX))
    sizes = [(b.engine_folder(ONNX) / r.file).stat().st_size for b, r in ((published, record), (exported_bundle, full))]
    assert sizes[0] < 0.7 * sizes[1]
    assert record.parity["relative_l2"] < 1e-5
    assert record.parity["batch_invariant"] is True
    assert np.abs(images_of(published, "onnx") - images_of(published, "torch")).max() <= 1


def test_the_casts_change_no_bit(published: Bundle, tmp_path: Path) -> None:
    """Against the same graph with its half weights written out as float32."""
    file = published.engine_folder(ONNX) / EngineRecord.read(published.engine_folder(ONNX)).file
    model = onnx.load(file)
    casts = {node.input[0]: node.output[0] for node in model.graph.node if node.input[0].endswith(".fp16")}
    assert len(casts) > 5
    for tensor in model.graph.initializer:
        if tensor.name in casts:
            array = onnx.numpy_helper.to_array(tensor)
            assert array.dtype == np.float16
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), casts[tensor.name]))
    others = [node for node in model.graph.node if node.input[0] not in casts]
    model.graph.ClearField("node")
    model.graph.node.extend(others)
    onnx.save(model, tmp_path / "plain.onnx")
    feed = {"noise": noise(SEEDS[:64], published.spec.noise_shape), "class_ids": np.arange(64) % 10}
    found, expected = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["denoised"], feed)[0]
        for path in (file, tmp_path / "plain.onnx")
    )
    np.testing.assert_array_equal(found, expected)


def test_weights_that_would_move_a_pixel_by_two_stay_float32(original: Bundle, tmp_path: Path) -> None:
    weights = original.weights()
    last = next(name for name in weights if name.endswith("aux_conv.weight"))
    loud = Bundle.write(tmp_path / "loud", original.spec, weights | {last: 1000 * weights[last]}, "")
    bundle, rounding = store(loud, tmp_path / "out")
    assert rounding.largest_difference >= 2
    assert rounding.precision == bundle.stored_precision() == "fp32"
    assert bundle.weights_sha256 == loud.weights_sha256
    np.testing.assert_array_equal(images_of(bundle, "torch"), images_of(loud, "torch"))


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A generator of forty classes; for as long as the test runs, any network is a heavy one."""
    monkeypatch.setattr(flops, "HEAVY_FLOPS", 1)
    return random_bundle(tmp_path / "heavy", seed=3, num_classes=40)


def test_of_a_heavy_network_few_classes_decide_and_the_card_says_so(
    heavy: Bundle, published: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, rounding = store(heavy, tmp_path / "out", progress)
    assert (rounding.images, rounding.precision, bundle.stored_precision()) == (32, "fp16", "fp16")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "float32: 0/32 images"
    assert "half precision: 0/32 images" in lines
    record = EngineRecord.read(published.engine_folder(ONNX))
    card = published_card(bundle, rounding, record, [], "")
    assert "(32 images, seeds 0-31, of as many of the 40 classes, evenly spaced; no weight of any class is too large" in card


def test_a_weight_of_a_class_that_is_not_drawn_is_seen(heavy: Bundle, published: Bundle, tmp_path: Path) -> None:
    weights = heavy.weights()
    (label,) = [name for name, array in weights.items() if name.endswith("map_label.weight")]
    drawn = {40 * place // 32 for place in range(32)}
    weights[label][:, next(i for i in range(40) if i not in drawn)] = 1e5
    loud = Bundle.write(tmp_path / "loud", heavy.spec, weights, "")
    bundle, rounding = store(loud, tmp_path / "out")
    assert (rounding.too_large, rounding.precision, bundle.stored_precision()) == (label, "fp32", "fp32")
    assert bundle.weights_sha256 == loud.weights_sha256
    record = EngineRecord.read(published.engine_folder(ONNX))
    said = f"`{WEIGHTS}` holds float32: half precision cannot hold the largest numbers of `{label}`."
    assert said in published_card(bundle, rounding, record, [], "")


def test_the_card_is_made_of_what_is_there(
    original: Bundle, published: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (published.path / CARD).read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["library_name"]) == ("mit", "uni-instruct")
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == RECIPE | {"data": "data.zip"}
    assert "No scores were measured" in card
    # The command beside the picture makes the picture.
    (command,) = re.findall(r"^uni-instruct (generate .*)--grid samples.png$", card, flags=re.MULTILINE)
    monkeypatch.chdir(published.path)
    assert cli(*command.split(), "--grid", tmp_path / "again.png")[0] == 0
    sheet = np.asarray(Image.open(published.path / SAMPLES))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again.png")), sheet)
    assert sheet.shape == (10 * 68, 16 * 68)


def scores_file(path: Path, weights_sha256: Any, seeds: str = "0-99", value: float = 0.25) -> Path:
    scores = {"generator": {"weights_sha256": weights_sha256, "values": {"FD(x)": value}}}
    facts = {"scores": scores, "reference": {"name": "digits"}, "seeds": seeds}
    path.write_text(json.dumps(facts))
    return path


def test_scores_come_with_their_command_and_of_these_weights_only(
    original: Bundle, published: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(bundle: Bundle, path: Path, precision: str) -> dict[str, str]:
        """The engine of the same weights: exporting anew takes ten times as long."""
        shutil.copy(published.engine_folder(ONNX) / EngineRecord.read(published.engine_folder(ONNX)).file, path)
        return {}

    monkeypatch.setattr(onnxruntime_target, "build", build)
    out = shutil.copytree(published.path, tmp_path / "out")
    first = scores_file(tmp_path / "1.json", published.weights_sha256)
    second = scores_file(tmp_path / "2.json", original.weights_sha256, "100-199", 0.375)
    publish(original.path, out, [first, second])
    card = (out / CARD).read_text()
    for line in (
        "|  | seeds 0-99 | seeds 100-199 |",
        "| FD(x) | 0.25 | 0.375 |",
        "uni-instruct evaluate . --reference digits --seeds 100-199",
        "Measured on the float32 weights, before they were rounded.",
    ):
        assert line in card.splitlines()
    assert (out / WEIGHTS).read_bytes() == (published.path / WEIGHTS).read_bytes()
    other = scores_file(tmp_path / "3.json", "0" * 64)
    with pytest.raises(RequestError, match=r"were measured on other weights \(sha256 0000"):
        publish(original.path, out, [other])
    assert (out / CARD).read_text() == card


def test_a_card_is_made_again_and_its_command_gives_its_numbers(
    published: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uni_instruct.evaluate import classifier

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "STEPS", 20)
    out = shutil.copytree(published.path, tmp_path / "out")
    assert cli("card", out, "--reference", "digits", "--samples", "40")[0] == 0
    card = (out / CARD).read_text()
    assert "|  | mean ± spread of 3 sets | seeds 0-39 | seeds 40-79 | seeds 80-119 |" in card
    (command,) = re.findall(r"^uni-instruct (evaluate .*)$", card, flags=re.MULTILINE)
    monkeypatch.chdir(out)
    scores = json.loads(cli(*command.split(), "--json")[1])["scores"]["generator"]
    for name, value in scores["values"].items():
        cells = [f"{value:.4g} ± {scores['spread'][name]:.2g}", *(f"{of_set[name]:.4g}" for of_set in scores["by_set"])]
        assert f"| {name} | {' | '.join(cells)} |" in card
    assert "Features: digits-classifier, sha256 " in card
    # All else is as `publish` wrote it.
    before, after = ((folder / CARD).read_text().split("## ") for folder in (published.path, out))
    assert [part for part in before if not part.startswith("Scores")] == [p for p in after if not p.startswith("Scores")]
    assert Bundle.open(out).weights_sha256 == published.weights_sha256


@pytest.mark.parametrize("kind", ["a name of the package", "a run's generator"])
def test_a_card_is_written_into_a_published_folder_alone(
    kind: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = "digits" if kind == "a name of the package" else str(random_bundle(tmp_path / "generator", 1).path)
    before = sorted(tmp_path.rglob("*"))
    code, _, errors = cli("card", named)
    remedy = f"publish it first: uni-instruct publish {named} --out FOLDER"
    assert (code, errors) == (2, f"error: {named} is not the folder of a published generator; {remedy}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_card_takes_no_scores_of_other_weights(published: Bundle, tmp_path: Path, cli: Cli) -> None:
    out = shutil.copytree(published.path, tmp_path / "out")
    code, _, errors = cli("card", out, "--scores", scores_file(tmp_path / "other.json", "0" * 64))
    assert (code, "were measured on other weights (sha256 0000" in errors) == (2, True), errors
    assert (out / CARD).read_text() == (published.path / CARD).read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing", "there is no bundle"),
        ("other bundle", "exists, and is not an earlier publication of these weights; name another folder"),
        ("itself", "exists, and is not an earlier publication of these weights; name another folder"),
        ("full folder", "exists, and is not an earlier publication"),
        (
            "scores no json",
            "does not hold the scores of a generator; pass a file with the output of 'uni-instruct evaluate GENERATOR --json'",
        ),
        ("scores of images", "lacks the hash of the weights, the name of the reference or the seeds"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_everything(
    wrong: str, message: str, original: Bundle, published: Bundle, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("precious")
    other = random_bundle(tmp_path / "other", seed=9)
    (tmp_path / "no.json").write_text("{}")
    images = scores_file(tmp_path / "images.json", None)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = tmp_path / "out"
    arguments: dict[str, list[str | Path]] = {
        "missing": [tmp_path / "none", "--out", out],
        "other bundle": [other.path, "--out", published.path],
        "itself": [published.path, "--out", published.path],
        "full folder": [other.path, "--out", tmp_path / "full"],
        "scores no json": [other.path, "--out", out, "--scores", tmp_path / "no.json"],
        "scores of images": [other.path, "--out", out, "--scores", images],
    }
    code, output, errors = cli("publish", *arguments[wrong], "--json")
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_no_folder_of_the_machine_is_published(published: Bundle) -> None:
    assert without_folders({"a": ["/x/y/teacher", {"b": "runs/here"}], "c": 3, "d": "hf://a/b"}) == {
        "a": ["teacher", {"b": "runs/here"}],
        "c": 3,
        "d": "hf://a/b",
    }
    for name in (CONFIG, CARD, "engines/onnx-fp32/engine.json"):
        assert "somebody" not in (published.path / name).read_text()


def test_inspect_says_how_weights_are_stored(original: Bundle, published: Bundle, cli: Cli) -> None:
    assert "MB of fp16, sha256" in cli("inspect", published.path)[1]
    assert "MB of fp32, sha256" in cli("inspect", original.path)[1]


def test_a_teacher_is_published_to_distil_from(tmp_path: Path, cli: Cli) -> None:
    run = random_bundle(tmp_path / "RUN" / "teacher", seed=2, steps=3)
    Bundle.write(run.path, replace(run.spec, provenance={"data": "/home/somebody/data.zip"}), run.weights(), "# tiny\n", b"png")
    code, text, err = cli("publish", str(run.path), "--out", str(tmp_path / "tiny-teacher"))
    assert code == 0, err
    teacher = Bundle.open(tmp_path / "tiny-teacher")
    assert (teacher.spec.steps, teacher.stored_precision()) == (3, "fp16")
    assert teacher.spec.provenance["data"] == "data.zip"
    assert sorted(path.name for path in teacher.path.iterdir()) == [CARD, CONFIG, WEIGHTS, SAMPLES]
    seeds = range(64)
    before, after = (
        generate_images(open_engine(bundle, "torch"), seeds, np.arange(64) % 10).astype(int)
        for bundle in (Bundle.open(run.path), teacher)
    )
    found = re.search(r"([\d.]+)% of the pixels of seeds 0-63 differ, by up to (\d+) levels", (teacher.path / CARD).read_text())
    assert found
    assert float(found[1]) == pytest.approx(100 * (before != after).mean(), abs=0.01)
    assert int(found[2]) == np.abs(before - after).max()
    assert f"by up to {found[2]} levels (64 images)" in text
    assert "float32: 0/64 images" in err
    again = cli("publish", str(run.path), "--out", str(tmp_path / "tiny-teacher"), "--scores", str(teacher.path / CARD))
    assert (again[0], "is a teacher, and its card already has the scores" in again[2]) == (2, True)
