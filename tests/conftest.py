"""What several test modules share: small bundles with random weights, and the rule for Debian packages."""

import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builders.bundles import random_bundle
from builders.shared import made_once
from uni_instruct.bundle import Bundle
from uni_instruct.cli import main


def pytest_collection_finish() -> None:
    """Exempts what is imported by now from garbage collection: it stays, and walking it takes most of a collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A conditional one-step generator of 8x8 grey images, random weights. Read only: copy it before changing it."""
    return random_bundle(tmp_path_factory.mktemp("bundles") / "tiny", seed=1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A many-step teacher of the same shape."""
    return random_bundle(tmp_path_factory.mktemp("bundles") / "teacher", seed=2, steps=4)


@pytest.fixture(scope="session")
def digits_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A many-step teacher with the weights of the digits that ship: real ones, though of one noise level only."""
    shipped = Bundle.open("digits")
    spec = dataclasses.replace(shipped.spec, steps=4)
    return Bundle.write(tmp_path_factory.mktemp("bundles") / "digits", spec, shipped.weights(), "test").path


@pytest.fixture(scope="session")
def exported_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of `tiny_bundle` with its onnx engine. Read only: copy it before changing it."""

    def export(folder: Path) -> None:
        from uni_instruct.export.targets import export_engine

        export_engine(random_bundle(folder, seed=1), "onnx-fp32")

    return Bundle.open(made_once(tmp_path_factory, "exported", export))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The entry point in this process, which saves imports: cli("inspect", path) -> exit code, output, error output."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["uni-instruct", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        return int(code or 0), output.out, output.err

    return run


@pytest.fixture
def quick_classifier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Classifiers learn for a moment only, and are kept in a cache of their own: for what is said, not how well it is known."""
    from uni_instruct.evaluate import classifier

    monkeypatch.setattr(classifier, "STEPS", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights on this machine and no way to any."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
