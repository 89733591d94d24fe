"""Bundles on the Hugging Face hub, through the real client, against a server on this machine that answers as the hub does."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders.hub import COMMIT, Hub, serving
from builders.machine import run_cli
from uni_instruct.bundle import Bundle


@pytest.fixture
def hub(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Hub]:
    folder = shutil.copytree(tiny_bundle.path, tmp_path / "repository")
    (folder / "private-notes.txt").write_text("no part of the bundle")
    with serving(Hub(folder)) as server:
        yield server


def test_bundle_of_the_hub_is_fetched_once_and_then_used_offline(hub: Hub, tiny_bundle: Bundle, tmp_path: Path) -> None:
    online = hub.environment(tmp_path / "cache")
    done = run_cli("inspect", "hf://someone/generator@v1", "--json", env=online)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["path"] == f"hf://someone/generator@{COMMIT}"
    assert facts["weights_sha256"] == tiny_bundle.weights_sha256
    assert any(path.endswith("model.safetensors") for path in hub.asked)
    assert not any(path.endswith("private-notes.txt") for path in hub.asked)

    hub.asked.clear()
    offline = hub.environment(tmp_path / "cache", HF_HUB_OFFLINE="1")
    out = tmp_path / "made.npz"
    done = run_cli("generate", "hf://someone/generator@v1", "--seeds", "0-3", "--out", out, env=offline)
    assert done.returncode == 0, done.stderr
    assert out.exists()
    assert hub.asked == []


def test_checkpoint_of_the_hub_is_imported_with_its_commit(hub: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    bundle = Bundle.open(hub.folder)
    (hub.folder / "runs").mkdir()
    weights = {name: torch.from_numpy(array) for name, array in bundle.weights().items()}
    save_file(weights, hub.folder / "runs" / "weights.safetensors")
    source = "hf://someone/generator/runs/weights.safetensors"
    done = run_cli("import", source, "--out", tmp_path / "bundle", env=hub.environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    imported = Bundle.open(tmp_path / "bundle")
    assert imported.spec.provenance["imported"]["file"] == f"{source}@{COMMIT}"
    assert imported.weights().keys() == bundle.weights().keys()


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("hf://someone/else", {}, "there is no such repository, or it is private; check the address"),
        ("hf://someone/generator@v9", {}, "it has no such revision"),
        ("hf://someone", {}, "hf://someone is not an address on the hub; write hf://owner/name"),
        ("hf://someone/generator", {"HF_HUB_OFFLINE": "1"}, "the cache has no copy; unset HF_HUB_OFFLINE to download it once"),
        ("hf://someone/generator", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub was not reached"),
    ],
)
def test_what_the_hub_does_not_have_is_told(
    hub: Hub, tmp_path: Path, source: str, settings: dict[str, str], message: str
) -> None:
    done = run_cli("inspect", source, env=hub.environment(tmp_path / "cache", **settings))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
