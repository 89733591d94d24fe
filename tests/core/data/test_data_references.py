"""What others keep to compare with: EDM's .npz, EDM2's .pkl, OpenAI's reference batches."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uni_instruct.data import Dataset, open_dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate import Statistics, open_reference

Cli = Callable[..., tuple[int, str, str]]
DIM = 2048


@pytest.fixture(scope="module")
def moments() -> dict[str, np.ndarray]:
    """mu [2048] and sigma [2048, 2048], float64."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(DIM, 8))
    return {"mu": rng.normal(size=DIM), "sigma": factor @ factor.T}


@pytest.mark.parametrize("kind", ["edm", "edm2", "edm2-protocol-5", "openai"])
def test_statistics_of_others_are_those_of_inception(tmp_path: Path, moments: dict[str, np.ndarray], kind: str) -> None:
    path = tmp_path / ("ref.npz" if kind in ("edm", "openai") else "ref.pkl")
    if kind == "edm":
        np.savez(path, **moments)
    elif kind == "openai":  # images, and the statistics of all of ImageNet beside them
        np.savez(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8), mu_s=np.zeros(9), sigma_s=np.eye(9), **moments)
    else:
        dinov2 = {"mu": np.zeros(1024), "sigma": np.eye(1024)}
        content = {"num_images": 1281167, "fid": moments, "fd_dinov2": dinov2}
        path.write_bytes(pickle.dumps(content, protocol=5 if kind == "edm2-protocol-5" else 4))
    reference = open_reference(path)
    assert isinstance(reference, Statistics)
    assert (reference.name, reference.extractor, len(reference)) == ("ref", "inception-v3", 0)
    assert np.array_equal(reference.mu, moments["mu"])
    assert np.array_equal(reference.sigma, moments["sigma"])
    assert reference.sigma.dtype == np.float64


def test_features_that_others_keep_become_statistics(tmp_path: Path) -> None:
    """OpenAI's pool_3, also as [N, 2048, 1, 1], clean-fid's feats, and mean and cov under those names: the same numbers."""
    features = np.random.default_rng(1).normal(size=(5, DIM)).astype(np.float32)
    exact = features.astype(np.float64)
    centred = exact - exact.sum(0) / 5
    sigma = centred.T @ centred / 4
    for arrays in ({"pool_3": features}, {"pool_3": features[:, :, None, None]}, {"feats": features}):
        np.savez(tmp_path / "x.npz", **arrays)
        reference = open_reference(tmp_path / "x.npz")
        assert isinstance(reference, Statistics)
        assert np.allclose(reference.mu, exact.sum(0) / 5, atol=1e-12)
        assert np.allclose(reference.sigma, sigma, atol=1e-12)
        assert len(reference) == 5
    np.savez(tmp_path / "x.npz", mean=exact.mean(0), cov=sigma)
    (tmp_path / "x.npz").rename(tmp_path / "x.stats")  # known by its content
    reference = open_reference(tmp_path / "x.stats")
    assert isinstance(reference, Statistics)
    assert np.array_equal(reference.sigma, sigma)
    np.savez(tmp_path / "x.npz", pool_3=features[:, :64])
    with pytest.raises(RequestError, match="has 64 features, but inception-v3 has 2048"):
        open_reference(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", feats=np.zeros(3, np.int64))
    with pytest.raises(RequestError, match=r"has feats of int64 \[3\]; give features \[N, 2048\], or mu and sigma"):
        open_reference(tmp_path / "x.npz")


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_fidelitys_cache_of_a_data_set_is_a_reference(
    tmp_path: Path, moments: dict[str, np.ndarray], legacy: bool
) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x-stat-fid-inception-v3-compat-2048.pt"
    torch.save(moments, path, _use_new_zipfile_serialization=not legacy)
    reference = open_reference(path)
    assert isinstance(reference, Statistics)
    assert np.array_equal(reference.mu, moments["mu"])
    torch.save(torch.zeros(3, 2048), path)
    with pytest.raises(RequestError, match="contains no reference statistics, only ndarray"):
        open_reference(path)


class Attack:
    """What a pickle may ask for."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fd_dinov2": {}}, r"ref\.pkl contains no reference statistics, only keys fd_dinov2; give a file that EDM2's"),
        ([1, 2], r"contains no reference statistics, only list"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.eye(3)}}, r"has 3 features, but inception-v3 has 2048"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.eye(4)}}, r"has mu \[3\] and sigma \[4, 4\]"),
        ({"fid": {"mu": np.full(3, np.nan), "sigma": np.eye(3)}}, r"give finite mu \[D\] and sigma"),
        ({"fid": {"mu": "text", "sigma": {}}}, r"mu and sigma in .*ref\.pkl are not numbers"),
        ({"fid": {"sigma": np.eye(3)}}, r"has mu \[\]"),
    ],
)
def test_pickles_of_anything_else_are_one_clear_line(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "ref.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(RequestError, match=message) as error:
        open_reference(path)
    assert "\n" not in str(error.value)


def test_nothing_in_a_pickle_is_run(tmp_path: Path, cli: Cli) -> None:
    path, trace = tmp_path / "ref.pkl", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"fid": {"mu": Attack(trace), "sigma": np.eye(3)}}))
    code, output, errors = cli("evaluate", "digits", "--reference", path)
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert "system" in errors
    assert not trace.exists()


def test_a_reference_batch_is_a_data_set_and_scores(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end, digits kept as OpenAI keeps images: arr_0, and the labels as arr_1; to itself the distance is nothing."""
    pytest.importorskip("torch")
    from uni_instruct.evaluate import classifier

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "STEPS", 50)
    digits = open_dataset("digits")
    assert digits.labels is not None
    path = tmp_path / "batch.npz"
    np.savez(path, digits.images(range(500)), digits.labels[:500])
    reference = open_reference(path)
    assert isinstance(reference, Dataset)
    assert (len(reference), reference.num_classes) == (500, 10)
    code, output, errors = cli("evaluate", path, "--reference", path, "--metrics", "fd", "--json")
    assert code == 0, errors
    assert json.loads(output)["scores"]["images"]["values"]["FD(batch-classifier)"] == pytest.approx(0, abs=1e-3)
    code, output, _ = cli("evaluate", f"{path},{path}", "--reference", path, "--metrics", "fd", "--json")
    assert (code, json.loads(output)["scores"]["images"]["samples"]) == (0, 1000)
