"""EDM2's latent zips: read, drawn from, written again, refused where images are needed, and trained on."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import arrays_dataset, npy, png, zip_of
from uni_instruct.data import Dataset, open_dataset, write_zip
from uni_instruct.data.vae_latents import RAW_MEAN, RAW_STD, draw_latents
from uni_instruct.errors import RequestError
from uni_instruct.evaluate.statistics import open_reference

Cli = Callable[..., tuple[int, str, str]]
# What EDM2's StabilityVAEEncoder (github.com/NVlabs/edm2, commit 4bf8162) makes of means 9 sin(0.37 k), k = 0..15, and
# no deviation.
EDM2 = [
    [-0.696642637, -0.306410193, 0.0310061574, 0.269938588],
    [0.618282199, 0.584575415, 0.424143851, 0.158701181],
    [0.202879578, -0.243349314, -0.658830881, -0.987331629],
    [-0.993624806, -1.03767657, -0.896925211, -0.590420485],
]


def moments(count: int, side: int = 4, seed: int = 0) -> np.ndarray:
    """Means about EDM2's, deviations of 0.3: float32 [count, 8, side, side]."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(count, 4, side, side)) * 4
    return np.concatenate([means, np.full_like(means, 0.3)], axis=1).astype(np.float32)


def latent_zip(path: Path, stored: np.ndarray, labels: list[int] | None = None) -> Path:
    """As EDM2's `dataset_tool.py encode` writes it."""
    files = {f"00000/img-mean-std-{i:08d}.npy": npy(array) for i, array in enumerate(stored)}
    named = None if labels is None else [list(pair) for pair in zip(files, labels, strict=True)]
    return zip_of(path, files, {"labels": named})


def test_latents_are_normalised_as_edm2_does() -> None:
    means = (np.sin(np.arange(16) * 0.37) * 9).astype(np.float32).reshape(1, 4, 2, 2)
    final = draw_latents(np.concatenate([means, np.zeros_like(means)], axis=1), [5])
    assert final.dtype == np.float32
    np.testing.assert_allclose(final.transpose(0, 3, 1, 2).reshape(4, 4), EDM2, rtol=1e-6, atol=1e-6)


def test_each_draw_depends_on_its_seed_alone_and_has_the_stored_deviation() -> None:
    stored = np.repeat(moments(1, side=8), 200, axis=0)
    draws = draw_latents(stored, range(200))
    assert np.array_equal(draw_latents(stored[:3], [7, 150, 7]), draws[[7, 150, 7]])
    scale = 0.5 / np.array([4.17, 4.62, 3.71, 3.28])
    np.testing.assert_allclose(draws.std(0).mean((0, 1)), 0.3 * scale, rtol=0.03)
    expected = (stored[0, :4] - np.array([5.81, 3.25, 0.12, -2.15]).reshape(4, 1, 1)) * scale.reshape(4, 1, 1)
    np.testing.assert_allclose(draws.mean(0).transpose(2, 0, 1), expected, atol=5 * 0.3 * 0.16 / 200**0.5)


def test_a_latent_zip_is_read_and_written_as_edm2s(tmp_path: Path) -> None:
    stored = moments(5)
    dataset = open_dataset(latent_zip(tmp_path / "latents.zip", stored, [2, 0, 1, 1, 2]))
    assert (dataset.image_shape, dataset.num_classes, len(dataset), dataset.latents) == ((4, 4, 4), 3, 5, True)
    assert np.array_equal(dataset.stored([4, 1]), stored[[4, 1]])
    assert np.array_equal(dataset.floats([4, 1], [9, 8]), draw_latents(stored[[4, 1]], [9, 8]))

    write_zip(dataset, tmp_path / "again.zip")
    with zipfile.ZipFile(tmp_path / "again.zip") as archive:
        assert archive.namelist()[:5] == [f"00000/img-mean-std-{i:08d}.npy" for i in range(5)]
        assert np.array_equal(np.load(io.BytesIO(archive.read("00000/img-mean-std-00000003.npy"))), stored[3])
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert labels[3] == ["00000/img-mean-std-00000003.npy", 1]
    assert open_dataset(tmp_path / "again.zip").fingerprint() == dataset.fingerprint()


def test_folders_hold_latents_too_and_pictures_win_over_stray_arrays(tmp_path: Path) -> None:
    stored = moments(2)
    for name, array in zip(("ant/1.npy", "bee/1.npy"), stored, strict=True):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(npy(array))
    dataset = open_dataset(tmp_path)
    assert (dataset.class_names, dataset.latents) == (("ant", "bee"), True)
    assert np.array_equal(dataset.stored([0, 1]), stored)
    (tmp_path / "ant" / "1.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
    (tmp_path / "bee" / "2.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
    pictures = open_dataset(tmp_path)
    assert (pictures.latents, len(pictures), pictures.image_shape) == (False, 2, (1, 4, 4))


def test_where_images_are_needed_latents_are_one_clear_line(tmp_path: Path, cli: Cli) -> None:
    path = latent_zip(tmp_path / "latents.zip", moments(2))
    with pytest.raises(RequestError, match="'latents' holds latents of a VAE, but images are needed here; give the images"):
        open_dataset(path).images([0])
    with pytest.raises(RequestError, match="holds latents, which cannot be resized; resize the images"):
        open_dataset(path, resolution=2)
    with pytest.raises(RequestError, match="holds latents of a VAE, but images are needed here"):
        open_reference(path)
    code, _, errors = cli("evaluate", "digits", "--reference", path)
    assert (code, "holds latents" in errors) == (2, True)
    text = cli("inspect", path)[1]
    assert "latents: 2 of 4x4 (height x width), 4 channels" in text


def test_pixels_become_floats_as_edm_does() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = arrays_dataset(levels, None).floats([0], [3])
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    np.testing.assert_allclose((floats + 1) * 127.5, levels, atol=1e-4)


class TestTraining:
    """What a training step is given; torch is needed from here on."""

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Dataset:
        stored, levels = moments(6), np.array([-1.0, 0.0, 1.0] * 2).reshape(6, 1, 1, 1)
        stored[:, :4] = np.reshape(RAW_MEAN, (4, 1, 1)) + levels * np.reshape(RAW_STD, (4, 1, 1))
        return open_dataset(latent_zip(tmp_path / "latents.zip", stored, [0, 1, 2] * 2))

    def test_batches_are_the_same_however_they_are_divided_and_differ_between_epochs(self, dataset: Dataset) -> None:
        torch = pytest.importorskip("torch")
        from uni_instruct.train.stages.data_loader import DataLoader

        cpu = torch.device("cpu")
        whole, class_ids = DataLoader(dataset, 4, seed=3)(7, slice(0, 4), cpu)
        halves = [DataLoader(dataset, 4, seed=3)(7, part, cpu) for part in (slice(0, 2), slice(2, 4))]
        assert whole.shape == (4, 4, 4, 4)
        assert torch.equal(torch.cat([images for images, _ in halves]), whole)
        assert torch.equal(torch.cat([ids for _, ids in halves if ids is not None]), class_ids)
        # Batches of the whole set: the same means in another order, drawn anew.
        batches = DataLoader(dataset, 6, seed=3)
        (first, first_ids), (second, second_ids) = (batches(step, slice(0, 6), cpu) for step in (0, 1))
        first, second = first[first_ids.argsort(stable=True)], second[second_ids.argsort(stable=True)]
        assert 0.02 < (first - second).std() / 2**0.5 < 0.05

    def test_metrics_are_refused_before_anything_is_read(self, dataset: Dataset) -> None:
        pytest.importorskip("torch")
        from uni_instruct.evaluate import Evaluator

        with pytest.raises(RequestError, match=r"holds latents of a VAE.*--set metric=none"):
            Evaluator(dataset)

    def test_a_teacher_learns_from_latents(self, dataset: Dataset) -> None:
        """The denoising loss falls, on latents of a deviation that sigma_data expects."""
        torch = pytest.importorskip("torch")
        from lightning_fabric import Fabric

        from uni_instruct.networks.build import build_denoiser
        from uni_instruct.train.plan import plan_teacher
        from uni_instruct.train.recipe import load_recipe
        from uni_instruct.train.rng import initial_weights, step_rng
        from uni_instruct.train.stages.data_loader import DataLoader
        from uni_instruct.train.stages.teacher import TeacherStage

        changes = ["model_channels=16", "channel_mult=[1]", "num_blocks=1", "attn_resolutions=[]", "teacher.batch=6"]
        recipe = load_recipe("digits", [*changes, "teacher.learning_rate=3e-3", "teacher.warmup_kimg=0", "metric=none"])
        spec = plan_teacher(recipe, dataset)
        assert (spec.image_shape, spec.num_classes) == ((4, 4, 4), 3)
        denoiser = initial_weights(lambda: build_denoiser(spec), 0)
        stage = TeacherStage(denoiser, DataLoader(dataset, 6, 0), recipe, Fabric(accelerator="cpu"))
        losses = [stage.step(step, step_rng(0, "teacher", step), True)["teacher/loss"] for step in range(60)]
        assert torch.stack(losses[-20:]).mean() < 0.8 * torch.stack(losses[:20]).mean()
