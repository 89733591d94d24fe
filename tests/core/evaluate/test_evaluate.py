"""Scores against truths: closed forms, torch-fidelity itself, and a judge that must know good from bad."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from builders.data_sets import all_images, arrays_dataset
from builders.machine import files_of_at_most
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate import (
    Evaluator,
    Extractor,
    Statistics,
    evaluate_images,
    frechet_distance,
    open_reference,
    write_statistics,
)
from uni_instruct.evaluate.classifier_file import RECIPE, classifier_path, read_classifier, weights_sha256
from uni_instruct.evaluate.sample_source import reference_class_ids
from uni_instruct.evaluate.scores import moments

torch = pytest.importorskip("torch")
FD, KD = "FD(digits-classifier)", "KD(digits-classifier)"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset("digits")


@pytest.fixture(scope="module")
def evaluator(digits: Dataset) -> Evaluator:
    """With the classifier that ships."""
    return Evaluator(digits)


@pytest.fixture
def some_digits(digits: Dataset) -> Dataset:
    """Data whose classifier does not ship."""
    assert digits.labels is not None
    return arrays_dataset(digits.images(range(600)), digits.labels[:600], 10)


def pixel_extractor(image_shape: tuple[int, int, int]) -> Extractor:
    """A torch-fidelity feature extractor whose features are the pixels, so that their distribution is known."""
    from uni_instruct.evaluate.fidelity import fidelity

    class Pixels(fidelity().FeatureExtractorBase):  # type: ignore[misc]
        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        def forward(self, images: Any) -> tuple[Any, ...]:
            return images.flatten(1).float(), images.flatten(1).float()

    module = Pixels("pixels", ["features", "logits"])
    return Extractor(name="pixels", sha256="", dim=math.prod(image_shape), module=module, image_shape=image_shape)


def gaussian_images(count: int, mean: np.ndarray, deviation: np.ndarray, seed: int) -> np.ndarray:
    """Images [count, 2, 2, 1] of independent pixels, rounded to levels."""
    draw = np.random.default_rng(seed).normal(mean, deviation, (count, 4))
    return np.rint(draw).astype(np.uint8).reshape(count, 2, 2, 1)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    mu1, mu2, var1, var2 = rng.normal(size=5), rng.normal(size=5), rng.uniform(0.1, 4, 5), rng.uniform(0.1, 4, 5)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    truth = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(var1) - np.sqrt(var2)) ** 2).sum()
    sigma1, sigma2 = basis @ np.diag(var1) @ basis.T, basis @ np.diag(var2) @ basis.T
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(truth, rel=1e-9)

    # Two dimensions, covariances that do not commute: tr sqrt(A) = sqrt(tr A + 2 sqrt(det A)).
    sigma1, sigma2, zero = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]]), np.zeros(2)
    product = sigma1 @ sigma2
    root_trace = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    truth = np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
    assert frechet_distance(zero, sigma1, zero, sigma2) == pytest.approx(truth, rel=1e-9)


def test_frechet_distance_of_images_with_gaussian_pixels() -> None:
    """The whole path, from uint8 images to the score, against the closed form; rounding adds a variance of 1/12."""
    mean1, mean2 = np.array([100.0, 120, 90, 110]), np.array([110.0, 118, 96, 110])
    deviation1, deviation2 = np.array([10.0, 15, 20, 12]), np.array([16.0, 15, 8, 12])
    reference = arrays_dataset(gaussian_images(20_000, mean1, deviation1, seed=1), None)
    images = gaussian_images(20_000, mean2, deviation2, seed=2)
    scores = Evaluator(reference, pixel_extractor((1, 2, 2)))(images, metrics=["fd"])
    spread = np.sqrt(deviation1**2 + 1 / 12) - np.sqrt(deviation2**2 + 1 / 12)
    truth = ((mean1 - mean2) ** 2).sum() + (spread**2).sum()
    assert scores.values == {"FD(pixels)": pytest.approx(truth, rel=0.02)}


def test_kernel_distance_of_two_points_in_closed_form() -> None:
    """All images equal: the squared discrepancy is k(a, a) + k(b, b) - 2 k(a, b) with k = (a.b/4 + 1)^3."""
    a, b = np.array([1, 2, 0, 3]), np.array([2, 0, 1, 1])
    reference = arrays_dataset(np.tile(a.astype(np.uint8).reshape(1, 2, 2, 1), (20, 1, 1, 1)), None)
    images = np.tile(b.astype(np.uint8).reshape(1, 2, 2, 1), (30, 1, 1, 1))
    scores = Evaluator(reference, pixel_extractor((1, 2, 2)))(images, metrics=["kd"])
    truth = (a @ a / 4 + 1) ** 3 + (b @ b / 4 + 1) ** 3 - 2 * (a @ b / 4 + 1) ** 3
    assert scores.values == {"KD(pixels)": pytest.approx(truth, rel=1e-5)}


def test_precision_and_recall_of_clusters() -> None:
    """The reference has two clusters. Images of one: precise, half recalled. A third of them elsewhere: two thirds precise."""
    centres = np.array([[40, 40, 40, 40], [200, 200, 200, 200], [40, 200, 40, 200]])
    first, second, elsewhere = (gaussian_images(60, centre, np.full(4, 3.0), seed=3) for centre in centres)
    judge = Evaluator(arrays_dataset(np.concatenate([first, second]), None), pixel_extractor((1, 2, 2)))
    assert judge(first, metrics=["pr"]).values == {"precision": 1.0, "recall": 0.5}
    mixed = judge(np.concatenate([first, second, elsewhere]), metrics=["pr"]).values
    assert mixed == {"precision": pytest.approx(2 / 3), "recall": 1.0}


def test_scores_are_torch_fidelitys_own(digits: Dataset, evaluator: Evaluator, tmp_path: Path) -> None:
    """The same images as folders of PNGs through torch_fidelity.calculate_metrics with the registered extractor."""
    from uni_instruct.evaluate.classifier_extractor import CLASSIFIER
    from uni_instruct.evaluate.fidelity import fidelity

    half = arrays_dataset(digits.images(range(0, 400, 2)), None)
    images = digits.images(range(1, 400, 2)) // 2
    for name, array in (("real", all_images(half)), ("generated", images)):
        (tmp_path / name).mkdir()
        for index, image in enumerate(array):
            Image.fromarray(image[:, :, 0]).save(tmp_path / name / f"{index:03d}.png")
    theirs = fidelity().calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real"),
        feature_extractor=CLASSIFIER,
        feature_extractor_weights_path=str(classifier_path(digits.fingerprint())),
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=200,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = Evaluator(half, evaluator.extractor)(images).values
    assert ours[FD] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours[KD] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_a_data_set_is_at_no_distance_from_itself(digits: Dataset, evaluator: Evaluator) -> None:
    scores = evaluator(all_images(digits), digits.labels)
    some = evaluator(all_images(digits), digits.labels, metrics=["class_accuracy", "pr", "fd"])
    assert some.values == {name: value for name, value in scores.values.items() if name != KD}
    assert scores.values[FD] == pytest.approx(0, abs=1e-4)
    assert scores.values[KD] == pytest.approx(0, abs=0.02)
    assert (scores.values["precision"], scores.values["recall"]) == (1, 1)
    assert scores.values["class_accuracy"] > 0.99
    assert (scores.extractor, scores.samples, scores.reference, scores.notes) == ("digits-classifier", 1797, "digits", ())


def test_the_classifier_is_a_good_judge(digits: Dataset, evaluator: Evaluator) -> None:
    """Right on digits it has not seen; worse images are farther away; a class that is missing is noticed."""
    assert evaluator.extractor.heldout_accuracy is not None
    assert evaluator.extractor.heldout_accuracy > 0.97
    assert digits.labels is not None
    rng, images = np.random.default_rng(5), all_images(digits)
    noisy = [np.clip(images + rng.normal(0, level, images.shape), 0, 255).astype(np.uint8) for level in (10, 40, 160)]
    variants = [images[::2], *noisy, rng.integers(0, 256, images.shape, dtype=np.uint8)]
    distances = [evaluator(variant, metrics=["fd"]).values[FD] for variant in variants]
    assert distances[0] < 0.5
    assert distances[1:] == sorted(distances[1:])
    assert distances[-1] > 10
    without = evaluator(images[digits.labels != 3], metrics=["fd", "pr"]).values
    assert without[FD] > 1
    assert without["recall"] < 0.97
    wrong = evaluator(images, (digits.labels + 1) % 10, ["class_accuracy"]).values
    assert wrong["class_accuracy"] < 0.01


@pytest.mark.parametrize("name", ["digits", "emoji", "fashion-mnist"])
def test_a_generator_that_ships_is_judged_by_a_classifier_that_ships(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is trained and nothing cached, so its distance is the same on every machine."""
    from uni_instruct.evaluate import classifier

    dataset = open_dataset(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = classifier.trained_classifier(dataset)
    assert path == classifier_path(dataset.fingerprint())
    assert path.parent == Path(classifier.__file__).parents[1] / "classifiers"
    _, info = classifier.load_classifier(path)
    assert (info.fingerprint, info.recipe) == (dataset.fingerprint(), RECIPE)
    assert (info.image_shape, info.num_classes) == (dataset.image_shape, dataset.num_classes)
    assert not (tmp_path / "cache").exists()


def test_only_data_to_the_last_bit_have_the_classifier_that_ships(digits: Dataset, some_digits: Dataset) -> None:
    images = all_images(digits).copy()
    images[0, 0, 0] ^= 1
    for other in (some_digits, arrays_dataset(images, digits.labels, 10)):
        assert classifier_path(other.fingerprint()).parent.parent.name == "uni-instruct"
    assert classifier_path(digits.fingerprint()).parent.parent.name == "uni_instruct"


def test_training_is_deterministic_cached_and_leaves_global_randomness_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, some_digits: Dataset
) -> None:
    from uni_instruct.evaluate import classifier

    monkeypatch.setattr(classifier, "STEPS", 25)
    state, hashes, paths = torch.get_rng_state(), [], []
    before = torch.get_num_threads()
    for folder, threads in (("first", 1), ("second", 2)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        torch.set_num_threads(threads)
        paths.append(classifier.trained_classifier(some_digits))
        hashes.append(weights_sha256(read_classifier(paths[-1])[0]))
    torch.set_num_threads(before)
    assert hashes[0] == hashes[1]
    assert torch.equal(torch.get_rng_state(), state)

    monkeypatch.setattr(classifier, "STEPS", 0)  # another training would give other weights
    monkeypatch.setattr(classifier, "MAX_STEPS", 0)
    assert classifier.trained_classifier(some_digits) == paths[1]
    assert weights_sha256(read_classifier(paths[1])[0]) == hashes[1]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    classifier.trained_classifier(some_digits)
    assert weights_sha256(read_classifier(paths[1])[0]) != hashes[1]


def test_a_cache_that_cannot_be_written(some_digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"cannot write .*/file/uni-instruct/classifiers/.*; set XDG_CACHE_HOME"):
        Evaluator(some_digits, "classifier")


@pytest.mark.usefixtures("quick_classifier")
def test_processes_that_want_one_classifier_train_it_once(
    some_digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from uni_instruct.evaluate import classifier

    trained = []

    def train(*arguments: object) -> object:
        trained.append(arguments)
        time.sleep(0.5)  # the other one arrives meanwhile
        return real_train(*arguments)  # type: ignore[arg-type]

    real_train = classifier.train_classifier
    monkeypatch.setattr(classifier, "train_classifier", train)
    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(classifier.trained_classifier, [some_digits, some_digits]))
    assert len(trained) == 1
    assert paths[0] == paths[1]
    assert [path.name for path in paths[0].parent.iterdir()] == [paths[0].name]
    assert "training the classifier of 'arrays'" in caplog.text


@pytest.mark.usefixtures("quick_classifier")
def test_a_cache_on_a_full_disk_keeps_no_part_of_a_classifier(some_digits: Dataset, tmp_path: Path) -> None:
    from uni_instruct.evaluate import classifier

    full = pytest.raises(RequestError, match=r"^cannot write .*: File too large; set XDG_CACHE_HOME to ")
    with files_of_at_most(10_000), full:
        classifier.trained_classifier(some_digits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_statistics_stand_for_their_data_set(digits: Dataset, evaluator: Evaluator, tmp_path: Path) -> None:
    write_statistics(evaluator.statistics(), tmp_path / "digits.npz")
    with np.load(tmp_path / "digits.npz") as file:  # as EDM's tools read it
        assert (file["mu"].dtype, file["mu"].shape, file["sigma"].shape) == (np.float64, (64,), (64, 64))
    kept = open_reference(tmp_path / "digits.npz")
    assert isinstance(kept, Statistics)
    assert digits.labels is not None
    images, labels = digits.images(range(300)) // 2, digits.labels[:300]
    whole, short = evaluator(images, labels), Evaluator(kept)(images, labels)
    assert short.values == {name: whole.values[name] for name in (FD, "class_accuracy")}
    assert short.extractor_sha256 == whole.extractor_sha256
    with pytest.raises(RequestError, match="metric 'kd' cannot be measured: the reference is statistics"):
        Evaluator(kept)(images, labels, ["kd"])
    with pytest.raises(RequestError, match="were made by digits-classifier, not by 'inception'"):
        Evaluator(kept, "inception")


@pytest.mark.usefixtures("quick_classifier")
def test_statistics_of_a_classifier_that_is_gone(some_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = Evaluator(some_digits, "classifier").statistics()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(
        RequestError,
        match="the classifier of the statistics, arrays-classifier, is not on this machine; give the data set itself",
    ):
        Evaluator(statistics)


def test_scores_do_not_depend_on_batches_or_memory_layout(digits: Dataset, evaluator: Evaluator) -> None:
    images = digits.images(range(150))
    transposed = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    for variant in ([images[i : i + 7] for i in range(0, 150, 7)], [transposed], [images[:149], images[149:]]):
        assert evaluator.score_batches(variant, metrics=["fd", "pr"]) == evaluator(images, metrics=["fd", "pr"])


def test_an_array_is_scored_as_the_evaluator_scores_it(digits: Dataset, evaluator: Evaluator) -> None:
    images, metrics = digits.images(range(60)), ["fd", "class_accuracy"]
    assert digits.labels is not None
    scores = evaluate_images(images, "digits", digits.labels[:60].tolist(), metrics=metrics)
    assert scores == evaluator(images, digits.labels[:60], metrics)
    assert scores.values["class_accuracy"] > 0.9


def test_moments_are_numpys_in_double_precision() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 1000
    mu, sigma = moments(features)
    truth = features.double().numpy()
    assert np.allclose(mu, truth.mean(0), rtol=1e-14)
    assert np.allclose(sigma, np.cov(truth.T), rtol=1e-10)


def test_classes_are_compared_by_name() -> None:
    def reference(*names: str) -> Dataset:
        made = arrays_dataset(np.zeros((len(names), 2, 2, 1), np.uint8), np.arange(len(names)), len(names))
        object.__setattr__(made, "class_names", names)
        return made

    ids = np.array([0, 1, 1])
    animals = reference("bird", "cat", "dog")
    assert reference_class_ids(ids, ("dog", "cat"), animals)[0].tolist() == [2, 1, 1]  # type: ignore[union-attr]
    assert reference_class_ids(ids, ("0", "1"), animals)[0].tolist() == [0, 1, 1]  # type: ignore[union-attr]
    none, note = reference_class_ids(ids, ("dog", "horse"), animals)
    assert (none, note) == (None, "no class_accuracy: class 'horse' is not among the reference's (bird, cat, dog)")
    assert reference_class_ids(None, (), animals) == (None, "")


def test_faulty_requests(digits: Dataset, evaluator: Evaluator) -> None:
    images = digits.images(range(10))
    unlabelled = arrays_dataset(images, None)
    wrong = {
        "metric 'fid' is unknown; choose from fd, kd, pr": lambda: evaluator(images, metrics=["fid"]),
        "metrics 'fd' are not a list; give a list of names": lambda: evaluator(images, metrics="fd"),
        "class id 10 is outside 0..9": lambda: evaluator(images, np.arange(1, 11)),
        "class id -1 is outside 0..9": lambda: evaluator(images, np.arange(-1, 9)),
        "no metric was named": lambda: evaluator(images, metrics=[]),
        "metric 'is' cannot be measured: it is defined by InceptionV3": lambda: evaluator(images, metrics=["is"]),
        "metric 'class_accuracy' cannot be measured: the classes of the images are unknown": lambda: evaluator(
            images, metrics=["class_accuracy"]
        ),
        "3 images are too few to score": lambda: evaluator(images[:3]),
        "there are no images to score": lambda: evaluator(images[:0]),
        "2 class ids were given for 10 images": lambda: evaluator(images, np.array([1, 2])),
        r"images of shape \[1, 4, 8\] cannot be compared": lambda: evaluator(images[:, :4]),
        r"images are float64 .* from -1 to 1, not uint8 \[N, H, W, C\]; convert floats": lambda: evaluator(images / 127.5 - 1),
        r"images are float32 \[2, 8, 8, 1\]": lambda: evaluator.score_batches([images[:8], images[8:].astype(np.float32)]),
        r"images are int64 \[10, 8, 8, 1\], not uint8": lambda: evaluator.extractor([images.astype(int)]),
        r"images are uint8 \[10, 8, 8\], not uint8 \[N, H, W, C\]": lambda: evaluate_images(images[..., 0], digits),
        r"images are float64 .*, not uint8": lambda: evaluate_images(images * 1.0, "no such data set"),
        r"class ids are <U1 \[2\], not integers \[N\]": lambda: evaluator(images, np.array(["1", "2"])),
        "extractor 'dino' is unknown; choose one of auto, inception": lambda: Evaluator(digits, "dino"),
        "0 classes and 10 images, too few for a classifier": lambda: Evaluator(unlabelled, "classifier"),
    }
    for message, call in wrong.items():
        with pytest.raises(RequestError, match=message):
            call()
