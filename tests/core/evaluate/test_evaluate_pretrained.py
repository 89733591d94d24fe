"""CLIP's and DINOv2's features, with drawn weights in files of the published layout: not everyone has the trained ones."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.data_sets import arrays_dataset
from builders.paths import ROOT
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate import PRETRAINED, Evaluator, Statistics
from uni_instruct.evaluate.extractors import ExtractorFile, open_pretrained, pretrained
from uni_instruct.evaluate.fidelity import fidelity
from uni_instruct.evaluate.pretrained import weight_file
from uni_instruct.system.files import sha256

torch = pytest.importorskip("torch")
Cli = Callable[..., tuple[int, str, str]]
CLIP, DINO = "clip-vit-b-32", "dinov2-vit-b-14"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """References' features of drawn weights belong in no cache but this test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript archive, as OpenAI's, of torch-fidelity's own network, one layer deep."""
    clip = fidelity("feature_extractor_clip")

    class Archive(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.visual = clip.CLIPVisual(16, 32, 1, 64, 8).visual
            self.text_projection = torch.nn.Parameter(torch.zeros(64, 16))

        def forward(self, images: Any) -> Any:
            return self.visual(images)

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is going; OpenAI's files stay as they are
        torch.manual_seed(0)
        archive = torch.jit.trace(Archive().eval(), torch.zeros(1, 3, 32, 32))
        path = tmp_path_factory.mktemp("clip") / "ViT-B-32.pt"
        torch.jit.save(archive, path)
    return path


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino") / "dinov2_vitb14_pretrain.pth"
    torch.save(drawn_dino(), path)
    return path


def drawn_dino() -> dict[str, Any]:
    """Weights by a closed formula, of two blocks: those that the numbers of DINOv2's own code are of."""
    from uni_instruct.networks.dinov2 import DinoV2

    state = DinoV2(dim=128, depth=2, hidden=512, patch=14, positions=37 * 37 + 1).state_dict()
    found = {}
    for n, (name, old) in enumerate(sorted(state.items())):
        plain = name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight", "pos_embed"))
        scale = 1.0 if plain else 2 / math.sqrt(old.shape[-1] if old.dim() > 1 else 4)
        index = torch.arange(old.numel(), dtype=torch.float64)
        found[name] = (scale * torch.sin(index * (0.7 + 0.013 * n) + n)).reshape(old.shape).float()
    return found


def test_dinov2_is_its_authors() -> None:
    """Against numbers that facebookresearch/dinov2 gave for the same weights and images, position embeddings resized."""
    from uni_instruct.networks.dinov2 import DinoV2

    truth = json.loads((ROOT / "tests" / "peer_numbers" / "dinov2.json").read_text())
    weights = drawn_dino()
    assert sorted(weights) == truth["names"]
    images = torch.sin(torch.arange(2 * 3 * 224 * 224, dtype=torch.float64) * 0.0137).reshape(2, 3, 224, 224).float()
    with torch.inference_mode():
        found = DinoV2.from_weights(weights)(images)
    np.testing.assert_allclose(found.flatten()[::3], truth["outputs"], atol=2e-5)


def test_features_are_the_network_s_of_the_named_resizing(clip_file: Path, dino_file: Path) -> None:
    """By hand: torch-fidelity's resizing, the network's normalisation, its weights."""
    from uni_instruct.networks.dinov2 import DinoV2

    resize = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    pixels = torch.from_numpy(IMAGES[:3]).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        large = resize(pixels, size=(224, 224), align_corners=False) / 255
        truth = DinoV2.from_weights(drawn_dino())(
            (large - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
        )
    dino = open_pretrained(DINO, dino_file, "d")
    np.testing.assert_allclose(dino([IMAGES[:3]]).features, truth, atol=1e-4)
    assert dino.resizing == "bilinear as TensorFlow 1 to 224x224, no antialiasing (torch-fidelity's)"
    clip = open_pretrained(CLIP, clip_file, "c")
    (truth,) = fidelity("feature_extractor_clip").FeatureExtractorCLIP(
        CLIP, ["clip"], feature_extractor_weights_path=str(clip_file)
    )(torch.from_numpy(IMAGES[:3]).permute(0, 3, 1, 2).contiguous())
    np.testing.assert_array_equal(clip([IMAGES[:3]]).features, truth)
    assert (clip.dim, dino.dim) == (16, 128)
    assert "to 32x32" in clip.resizing


@pytest.mark.parametrize("name", [CLIP, DINO])
def test_distances_are_named_after_the_network(name: str, clip_file: Path, dino_file: Path) -> None:
    file = clip_file if name == CLIP else dino_file
    extractor = open_pretrained(name, file, sha256(file))
    reference = arrays_dataset(IMAGES, np.arange(24) % 2, 2)
    scores = Evaluator(reference, extractor)(IMAGES[:20], np.arange(20) % 2, metrics=["fd", "kd", "pr"])
    assert list(scores.values) == [f"FD({name})", f"KD({name})", "precision", "recall"]
    assert scores.values["precision"] == 1.0
    grey = arrays_dataset(IMAGES[..., :1], None)
    assert Evaluator(grey, extractor)(IMAGES[..., :1], metrics=["fd"]).values[f"FD({name})"] < 1e-3
    with pytest.raises(RequestError, match=f"it is defined by InceptionV3, not by {name}"):
        Evaluator(reference, extractor)(IMAGES, metrics=["is"])
    # Workers open it from its file.
    assert extractor.file == ExtractorFile(path=file, maker=name, label=sha256(file))
    again = extractor.required_file().open()
    np.testing.assert_array_equal(again([IMAGES]).features, extractor([IMAGES]).features)


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_missing_file_is_one_line_with_what_to_put_where(name: str, offline: None) -> None:
    colour = arrays_dataset(IMAGES, None)
    with pytest.raises(RequestError) as error:
        Evaluator(colour, name)
    message, file = str(error.value), weight_file(name)
    assert "\n" not in message
    assert message.startswith(f"the weights of {name} are not on this machine; put {file.places[0].name} from https://")
    assert message.endswith(f"into {file.places[0].parent}, or give the file with --extractor-weights")


def test_a_file_in_the_cache_is_found(dino_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (place,) = weight_file(DINO).places
    place.parent.mkdir(parents=True)
    place.write_bytes(dino_file.read_bytes())
    statistics = Statistics(name="x", mu=np.zeros(128), sigma=np.eye(128), extractor=DINO)
    assert Evaluator(statistics).extractor.sha256 == sha256(dino_file)
    with pytest.raises(RequestError, match=f"were made by {DINO}, not by 'inception'"):
        Evaluator(statistics, "inception")


def test_another_file_is_refused(clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileFormatError, match=r"is not clip-vit-b-32: its SHA-256 is [0-9a-f]{8}\.\.\., not 40d36571"):
        pretrained(CLIP, clip_file)
    monkeypatch.setitem(fidelity("feature_extractor_clip").MODEL_METADATA[CLIP], "hash", sha256(clip_file))
    assert pretrained(CLIP, clip_file).dim == 16
    (tmp_path / "other.pth").write_bytes(b"something else")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pth")
    for name in ("other.pth", "linear.pth"):
        with pytest.raises(FileFormatError, match="holds no weights of DINOv2") as error:
            pretrained(DINO, tmp_path / name)
        assert "\n" not in str(error.value)


def test_the_command_takes_a_path_and_prints_the_resizing(dino_file: Path, tmp_path: Path, cli: Cli) -> None:
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    words = ("evaluate", tmp_path / "images.npz", "--reference", tmp_path / "images.npz")
    given = ("--extractor", DINO, "--extractor-weights", dino_file)
    code, out, err = cli(*words, *given, "--metrics", "fd")
    assert code == 0, err
    assert f"images FD({DINO}): " in out
    assert "images resized bilinear as TensorFlow 1 to 224x224, no antialiasing (torch-fidelity's)" in out
    code, _, err = cli(*words, "--extractor-weights", dino_file)
    assert (code, "or use --extractor with one of clip-vit-b-32" in err) == (2, True), err
    code, _, err = cli(*words, "--extractor", DINO, "--extractor-weights", tmp_path / "none")
    assert (code, "none is missing; put dinov2_vitb14_pretrain.pth from https://" in err) == (2, True), err
