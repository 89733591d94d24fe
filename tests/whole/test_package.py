"""What is installed: a wheel holds every generator that ships, small enough, and they work with nothing else at hand."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from builders.paths import ROOT
from uni_instruct.bundle import shipped_generators

SOURCES = ("uni_instruct", "train", "export", "serve", "pyproject.toml", "README.md", "LICENSE")
MAX_GENERATOR_BYTES = 16_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "src").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    done = subprocess.run([*command, str(folder / "src")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_every_file_of_every_generator(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {info.filename: info.file_size for info in archive.infolist()}
    for name in shipped_generators():
        folder = ROOT / "uni_instruct" / "generators" / name
        files = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        assert {f"uni_instruct/generators/{name}/{part}" for part in ("config.json", "model.safetensors", "README.md")} <= {
            *files
        }
        assert any(file.endswith(".onnx") for file in files)
        assert {file: packed.get(file) for file in files} == files
        assert sum(files.values()) < MAX_GENERATOR_BYTES
    parts = {folder: f"uni_instruct/{folder}" for folder in ("train/recipes", "serve/pages")}
    for folder, inside in (parts | {"uni_instruct/classifiers": "uni_instruct/classifiers"}).items():
        for path in (ROOT / folder).iterdir():
            assert f"{inside}/{path.name}" in packed


def test_shipped_generators_work_with_no_network_and_no_cache(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    # No connection can be made, the home cannot be written, and there is no torch.
    block = "import socket, sys\nsys.modules['torch'] = None\nsocket.socket.connect = None\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(block)
    inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = inherited | {
        "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{tmp_path / 'installed'}",
        "HOME": "/nonexistent",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for name in shipped_generators():
        for arguments in (["inspect", name], ["generate", name, "--seeds", "0-3", "--grid", f"{name}.png"]):
            command = [sys.executable, "-P", "-m", "uni_instruct", *arguments]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # How the engines did on this machine, and nothing else: ONNX Runtime's telemetry would be there.
    assert {path.relative_to(tmp_path / "cache").parts[:2] for path in (tmp_path / "cache").rglob("*.*")} == {
        ("uni-instruct", "engines")
    }
