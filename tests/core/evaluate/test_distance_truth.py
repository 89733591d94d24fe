"""Distances against independent computations: EDM's published procedure, other libraries' roots, torch-fidelity's score."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from uni_instruct.evaluate.extractors import Features
from uni_instruct.evaluate.scores import frechet_distance
from uni_instruct.evaluate.summary import SPLITS, Summary, SummaryPlan, concatenate_parts, summarise_features

torch = pytest.importorskip("torch")


def drawn(count: int, dim: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Features as ReLU leaves them: correlated, skewed, from 0 on, float32 [count, dim]."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / dim**0.5
    return np.maximum(rng.normal(0.3, scale, (count, dim)) @ mixing + 0.2, 0).astype(np.float32)


def summary_of(features: np.ndarray, logits: np.ndarray | None = None, size: int = 64) -> Summary:
    """Summed up in parts, as workers do."""
    plan, total = SummaryPlan(total=len(features), with_scores=logits is not None), None
    logits = np.zeros((len(features), 2), np.float32) if logits is None else logits
    for start in range(0, len(features), size):
        part = Features(torch.from_numpy(features[start : start + size]), torch.from_numpy(logits[start : start + size]))
        summary = summarise_features(part, plan, start)
        if total is None:
            total = summary
        else:
            total.add(summary)
    assert total is not None
    return total


def edm_fid(images: np.ndarray, reference: np.ndarray) -> float:
    """EDM's fid.py, step by step: sums in float64, then the trace of SciPy's square root of the product."""
    linalg = pytest.importorskip("scipy.linalg")

    def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mu, sigma = np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2)
        for batch in np.array_split(features, 7):
            x = batch.astype(np.float64)
            mu += x.sum(0)
            sigma += x.T @ x
        mu /= len(features)
        sigma -= np.outer(mu, mu) * len(features)
        return mu, sigma / (len(features) - 1)

    (mu, sigma), (mu_ref, sigma_ref) = statistics(images), statistics(reference)
    root = linalg.sqrtm(sigma @ sigma_ref)
    return float(np.real(np.square(mu - mu_ref).sum() + np.trace(sigma + sigma_ref - root * 2)))


@pytest.mark.parametrize(("dim", "count"), [(8, 60), (64, 900), (192, 1000)])
def test_distance_is_edms_of_the_same_features(dim: int, count: int) -> None:
    images, reference = drawn(count, dim, 1, 1.2), drawn(count + 100, dim, 2)
    ours = frechet_distance(*summary_of(images).moments(), *summary_of(reference).moments())
    assert ours == pytest.approx(edm_fid(images, reference), rel=1e-6)


def test_distance_of_singular_covariances_is_that_of_their_factors() -> None:
    """Fewer images than features: tr (S1 S2)^(1/2) is the nuclear norm of X1 X2^T, of the centred images themselves."""
    images, reference = drawn(40, 100, 1).astype(np.float64), drawn(30, 100, 2).astype(np.float64)
    centred = [x - x.mean(0) for x in (images, reference)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / np.sqrt(39 * 29)
    difference = images.mean(0) - reference.mean(0)
    traces = sum((c**2).sum() / (len(c) - 1) for c in centred)
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (images, reference)]
    assert frechet_distance(*moments[0], *moments[1]) == pytest.approx(difference @ difference + traces - 2 * nuclear, rel=1e-6)
    assert frechet_distance(*moments[0], *moments[0]) == pytest.approx(0, abs=1e-9 * traces)


def test_inception_score_is_torch_fidelitys() -> None:
    from uni_instruct.evaluate.fidelity import fidelity

    logits = np.random.default_rng(5).normal(0, 2, (1234, 30)).astype(np.float32)
    theirs = fidelity("metric_isc").isc_features_to_metric(torch.from_numpy(logits), SPLITS)
    ours = summary_of(np.zeros((1234, 3), np.float32), logits).inception_score()
    assert ours == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_sums_in_parts_are_numpys_of_the_whole() -> None:
    features = drawn(1000, 20, 3)
    summary = summary_of(features, size=192)
    mu, sigma = summary.moments()
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(summary.kept_features(), features)


def test_of_many_images_evenly_spaced_features_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from uni_instruct.evaluate import summary

    monkeypatch.setattr(summary, "KEPT_IMAGES", 100)
    features = drawn(1050, 4, 3)
    np.testing.assert_array_equal(summary_of(features).kept_features(), features[::11])


def test_kept_features_are_in_memory_once() -> None:
    """Of a million images they are the largest thing that a score holds."""
    size = 40 * 500 * 256 * 4
    tracemalloc.start()
    parts = [np.ones((500, 256), np.float32) for _ in range(40)]
    whole = concatenate_parts(parts)
    whole_and_last = np.ones_like(whole)  # only fits below the bound where the parts are gone
    _, peak = tracemalloc.get_traced_memory()
    del whole_and_last
    tracemalloc.stop()
    assert whole.shape == (20_000, 256)
    assert parts == []
    assert peak < 2.1 * size


def test_a_distance_matrix_is_never_larger_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from uni_instruct.evaluate import scores

    def measured() -> dict[str, float]:
        comparison = scores.Comparison(
            generated=summary_of(drawn(300, 6, 1)),
            mu=np.zeros(6),
            sigma=np.eye(6),
            reference=drawn(500, 6, 2),
            has_class_ids=False,
        )
        return scores._precision_recall(judge, comparison)

    judge: Any = None  # precision and recall ask nothing of the extractor
    truth, sizes, kth = measured(), list[int](), torch.Tensor.kthvalue
    monkeypatch.setattr(torch.Tensor, "kthvalue", lambda matrix, k: sizes.append(matrix.numel()) or kth(matrix, k))
    monkeypatch.setattr(scores, "_NEIGHBOUR_VALUES", 20_000)
    assert measured() == truth
    assert max(sizes) <= 20_000
    assert 0 < truth["precision"] < 1


@pytest.mark.parametrize(("count", "others", "dim"), [(61, 300, 6), (1100, 700, 64), (600, 900, 200)])
def test_precision_and_recall_are_those_of_all_distances(count: int, others: int, dim: int) -> None:
    """By brute force, in float64 and one pair after the other."""
    from uni_instruct.evaluate import scores

    images, reference = drawn(count, dim, 1, 1.1), drawn(others, dim, 2)

    def reach(points: np.ndarray) -> np.ndarray:
        return np.array([np.partition(np.linalg.norm(points - point, axis=1), 3)[3] for point in points.astype(np.float64)])

    between = np.stack([np.linalg.norm(reference - image, axis=1) for image in images.astype(np.float64)])
    precision, recall = (between <= reach(reference)).any(1).mean(), (between <= reach(images)[:, None]).any(0).mean()
    judge: Any = None  # precision and recall ask nothing of the extractor
    comparison = scores.Comparison(
        generated=summary_of(images), mu=np.zeros(dim), sigma=np.eye(dim), reference=reference, has_class_ids=False
    )
    assert scores._precision_recall(judge, comparison) == pytest.approx({"precision": precision, "recall": recall})
    assert 0 < recall < 1
