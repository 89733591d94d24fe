"""InceptionV3: where its weights come from, and what is measured with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.data_sets import arrays_dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate import Evaluator
from uni_instruct.evaluate.extractors import Extractor, open_inception

torch = pytest.importorskip("torch")


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's hub folder, empty, and no way to the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


def test_inception_offline_says_which_file_to_put_where(torch_home: Path) -> None:
    colour = arrays_dataset(np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 2, 2)
    with pytest.raises(RequestError) as error:
        Evaluator(colour)
    message = str(error.value)
    assert "\n" not in message
    assert "put weights-inception-2015-12-05-6726825d.pth from https://" in message
    assert f"into {torch_home}, or use --extractor classifier" in message
    assert not torch_home.exists()


def test_wrong_inception_weights_are_refused(torch_home: Path) -> None:
    torch_home.mkdir(parents=True)
    (torch_home / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    with pytest.raises(RequestError, match=r"6726825d\.pth is corrupt: its SHA-256 is [0-9a-f]{8}\.\.\.; get it again from"):
        Evaluator(arrays_dataset(np.zeros((8, 32, 32, 3), np.uint8), None))


def test_inception_network_scores_grey_and_colour_alike(tmp_path: Path) -> None:
    """The real network with drawn weights, as the trained ones cannot be had everywhere: names, and grey shown as colour."""
    from uni_instruct.evaluate.fidelity import fidelity

    class Drawn(fidelity().FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any, *options: Any) -> None:
            """Keeps the weights that it was built with."""

    torch.save({}, tmp_path / "empty.pth")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = Drawn("drawn", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(drawn.state_dict(), tmp_path / "drawn.pth")
    extractor = open_inception(tmp_path / "drawn.pth", "0" * 64)
    grey = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 1), dtype=np.uint8)
    colour = grey.repeat(3, axis=3)
    scores = Evaluator(arrays_dataset(grey, None), extractor)(grey[:10], metrics=["kd", "pr", "is"])
    assert list(scores.values) == ["KID", "precision", "recall", "IS"]
    assert scores.values == Evaluator(arrays_dataset(colour, None), extractor)(colour[:10], metrics=["kd", "pr", "is"]).values
    assert (scores.values["precision"], scores.extractor) == (1.0, "inception-v3")
    assert "10 images are too few for 2048 features" in scores.notes[0]


def test_features_are_made_in_full_float32() -> None:
    """On a GPU cuDNN would take TF32. The settings hold while a network runs; afterwards they are the user's again."""

    def settings() -> tuple[str, str]:
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    class Watched(torch.nn.Module):
        def forward(self, pixels: Any) -> Any:
            seen.append(settings())
            if pixels.max() == 255:
                raise ArithmeticError("white")
            return pixels.float().flatten(1), pixels.float().flatten(1)

    seen: list[tuple[str, str]] = []
    before, extractor = settings(), Extractor(name="watched", sha256="", dim=4, module=Watched())
    assert before != ("ieee", "ieee")
    assert len(extractor([np.zeros((3, 2, 2, 1), np.uint8)])) == 3
    assert settings() == before
    with pytest.raises(ArithmeticError, match="white"):
        extractor([np.full((3, 2, 2, 1), 255, np.uint8)])
    assert settings() == before
    assert seen == [("ieee", "ieee")] * 2
