"""What several test modules share: small bundles with random weights, and the rule for Debian packages."""

import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.cli import main
from uni_instruct.engines.record import EngineId
from uni_instruct.spec import ImageShape, ModelSpec

ONNX = EngineId("onnx", "fp32")
DIGITS = tuple(str(n) for n in range(10))


def require_debian(path: str, package: str) -> Path:
    """The file of a Debian package; where it is missing the test skips, in CI it fails."""
    if not Path(path).exists():
        message = f"needs the Debian package {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(path)


def run_cli(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a user calls it: a process of its own."""
    command = [sys.executable, "-m", "uni_instruct", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **kwargs)


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
    from uni_instruct.export.targets import export_engine

    bundle = random_bundle(tmp_path_factory.mktemp("bundles") / "exported", seed=1)
    export_engine(bundle, "onnx-fp32")
    return bundle


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


def random_bundle(
    path: Path,
    seed: int,
    steps: int = 1,
    num_classes: int = 10,
    image_shape: ImageShape = (1, 8, 8),
    patch: int = 1,
    latents: bool = False,
) -> Bundle:
    """A bundle whose images differ visibly between seeds and classes; latents: they are a VAE's latents."""
    torch = pytest.importorskip("torch")
    from uni_instruct.networks.build import build_denoiser

    around = {"patch": patch} if patch > 1 else {}
    spec = ModelSpec(
        name="tiny",
        noise_shape=image_shape,
        latents=latents,
        num_classes=num_classes,
        class_names=DIGITS[:num_classes],
        steps=steps,
        network_args={"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], **around},
    )
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_denoiser(spec).state_dict()
    weights = {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=rng) * ("resample" not in name)).numpy()
        for name, tensor in state.items()
    }
    return Bundle.write(path, spec, weights, card="# tiny\n")


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


@contextmanager
def files_of_at_most(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more than this to any file (errno EFBIG), here as a full disk does elsewhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
