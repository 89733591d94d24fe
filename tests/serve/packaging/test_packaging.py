"""`uni-instruct package`: what is in the Bento, and that it serves the generator's images, in a Python that has no torch."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from builders.bundles import ONNX, random_bundle
from builders.machine import run_cli
from builders.paths import ROOT
from builders.servers import Running, free_port
from uni_instruct.bundle import Bundle, shipped_generators
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids

Cli = Callable[..., tuple[int, str, str]]
# Where a test moves to another Python's packages, nothing of this one's may be found first.
OWN_PATH = {"PYTHONSAFEPATH": "1", "BENTOML_DO_NOT_TRACK": "true"}


class Packed(NamedTuple):
    facts: dict[str, Any]  # what --json printed
    errors: str
    folder: Path  # the archive, unpacked

    @property
    def src(self) -> Path:
        return self.folder / "src"

    @property
    def wheel(self) -> Path:
        return self.src / "wheels" / str(self.facts["wheel"])


@pytest.fixture(scope="module")
def packed(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Two generators, the first under a name of its own, called from a folder that holds something to trip over."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "bentoml.py").write_text("raise SystemExit('the wrong bentoml')")
    out = folder / "images.bento"
    environment = {**os.environ, "UNI_INSTRUCT_WORKERS": "7"}
    done = run_cli("package", f"mine={exported_bundle.path}", "digits", "--out", out, "--json", env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Packed(json.loads(done.stdout), done.stderr, unpacked(out, folder / "unpacked"))


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_the_archive_holds_the_bundles_and_their_engines(packed: Packed, exported_bundle: Bundle) -> None:
    contents = json.loads((packed.src / "contents.json").read_text())
    assert list(contents["bundles"]) == ["mine", "digits"]
    assert contents["bundles"] == packed.facts["bundles"]
    for name, original in (("mine", exported_bundle), ("digits", Bundle.open("digits"))):
        bundle = Bundle.open(packed.src / "bundles" / name)
        assert bundle.weights_sha256 == original.weights_sha256 == contents["bundles"][name]["weights_sha256"]
        assert set(bundle.engines()) == {ONNX}
        assert bundle.engines()[ONNX].file().read_bytes() == original.engines()[ONNX].file().read_bytes()
    assert (packed.src / "bundles/digits/reference.npz").is_file()  # by which an engine is trusted without torch


def test_the_archive_holds_this_packages_wheel(packed: Packed) -> None:
    with zipfile.ZipFile(packed.wheel) as archive:
        names = set(archive.namelist())
        for name, path in (("bundle.py", "uni_instruct/bundle.py"), ("serve/service.py", "serve/service.py")):
            assert archive.read(f"uni_instruct/{name}") == (ROOT / path).read_bytes()
    assert {f"uni_instruct/generators/{name}/config.json" for name in shipped_generators()} <= names


def test_requirements_are_what_is_installed_here_without_torch(packed: Packed) -> None:
    *pins, wheel = (packed.src / "requirements.txt").read_text().splitlines()
    assert wheel == f"./wheels/{packed.facts['wheel']}"
    versions = dict(pin.split("==") for pin in pins)
    assert {"bentoml", "gradio", "numpy", "onnxruntime", "openvino", "packaging", "starlette", "uvicorn"} <= {*versions}
    for name, version in versions.items():
        assert importlib.metadata.version(name).partition("+")[0] == version
    assert not [name for name in versions if name.startswith(("torch", "triton", "nvidia-cu", "uni-instruct"))]
    # The image gets the same, and BentoML of itself.
    image = (packed.folder / "env/python/requirements.txt").read_text().split()
    assert sorted(image) == sorted([*pins, wheel])


def test_the_image_is_made_of_them(packed: Packed) -> None:
    bento = yaml.safe_load((packed.folder / "bento.yaml").read_text())
    assert packed.facts["tag"] == f"{bento['name']}:{bento['version']}"
    assert bento["service"] == "service:UniInstruct"
    assert bento["services"][0]["config"]["workers"] == 1  # this shell's settings are not the container's
    assert {"name": "BENTOML_DO_NOT_TRACK", "value": "true", "stage": "all"} in bento["envs"]
    dockerfile = (packed.folder / "env/docker/Dockerfile").read_text()
    assert f"python:{sys.version_info.major}.{sys.version_info.minor}" in dockerfile
    assert "./src/wheels ./src/wheels" in dockerfile
    assert "pip install -e" not in dockerfile  # what `bentoml build` of the checkout does


def test_it_says_from_the_start_how_far_it_is(packed: Packed) -> None:
    lines = packed.errors.splitlines()
    assert lines[0] == "packaging: 0/6 steps"
    assert lines[-1].startswith("packaging: 6/6 steps")


def test_what_cannot_be_served_without_torch_is_refused_with_what_to_do(
    cli: Cli, exported_bundle: Bundle, tiny_bundle: Bundle, tiny_teacher: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "x.bento"

    def refused(*arguments: str | Path) -> str:
        code, printed, errors = cli("package", *arguments)
        assert (code, printed) == (2, "")
        return errors.splitlines()[-1].removeprefix("error: ")

    path = tiny_bundle.path
    assert refused(path, "--out", out) == (
        f"{path} has no engine that runs without torch; uni-instruct export {path} --to onnx"
    )
    latents = random_bundle(tmp_path / "latents", seed=0, image_shape=(4, 8, 8), latents=True)
    assert (
        "makes a VAE's latents and has no decoder to turn them into pictures; add the VAE's decoder: uni-instruct import"
        in refused(latents.path, "--out", out)
    )
    assert "is a teacher of 4 steps, which needs torch" in refused("digits", f"t={tiny_teacher.path}", "--out", out)
    for engine in ("openvino-fp32", "torch-fp32", "abacus"):
        wanted = refused("digits", "--engine", engine, "--out", out)
        assert wanted.endswith(f"has no engine {engine} that runs in a Bento; choose one of onnx-fp32")
    assert "are both called digits; give one a name of its own" in refused("digits", "digits", "--out", out)
    assert "there is no bundle" in refused(tmp_path / "nothing", "--out", out)
    altered = Path(shutil.copytree(exported_bundle.path, tmp_path / "altered"))
    (altered / "engines/onnx-fp32/tiny-8x8-onnx-fp32.onnx").write_bytes(b"altered")
    assert "does not match the sha256" in refused(altered, "--out", out)
    assert "give a file such as x.bento" in refused("digits", "--out", tmp_path / "x.zip")
    assert not out.exists()
    out.write_text("mine")
    assert refused("digits", "--out", out) == f"--out {out} exists already; choose another --out, or remove it"
    assert out.read_text() == "mine"


def check_images(url: str, **bundles: Bundle) -> None:
    """The server's images of each name are those made here; without a name, those of the first."""
    for name, bundle in {"": next(iter(bundles.values())), **bundles}.items():
        answer = httpx.post(f"{url}/v1/generate", json={"seeds": [7], **({"model": name} if name else {})})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-engine"] == "onnx-fp32"
        image = np.asarray(Image.open(io.BytesIO(answer.content)))
        engine = open_engine(bundle, "onnx")
        local = generate_images(engine, [7], resolve_class_ids(engine.spec, [7]))[0]
        np.testing.assert_array_equal(image.reshape(local.shape), local)


def check_server(command: list[str], folder: Path, environment: dict[str, str], **bundles: Bundle) -> None:
    port = free_port()
    environment = {"BENTOML_HOME": str(folder / "home"), "UNI_INSTRUCT_BUNDLE": "", **OWN_PATH, **environment}
    running = Running([*command, "--host", "127.0.0.1", "--port", str(port)], environment, port, folder)
    try:
        running.until_ready()
        check_images(running.url, **bundles)
        assert httpx.get(f"{running.url}/ui", follow_redirects=True).status_code == 200
    finally:
        running.kill()


@pytest.fixture(scope="module")
def installed(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the Bento, installed into a folder as pip installs it, over the packages that are here."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(packed.wheel)], check=True)
    return folder


@pytest.mark.slow
def test_the_bento_serves_without_torch(packed: Packed, installed: Path, exported_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    path = f"{tmp_path}{os.pathsep}{installed}"
    code = "import uni_instruct.serve\nprint(uni_instruct.serve.__file__)\nimport torch"
    tried = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **OWN_PATH, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert tried.stdout.startswith(str(installed))
    assert "ModuleNotFoundError" in tried.stderr
    command = [sys.executable, "-m", "bentoml", "serve", str(packed.folder)]
    check_server(command, tmp_path, {"PYTHONPATH": path}, mine=exported_bundle, digits=Bundle.open("digits"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_environment_can_be_built(packed: Packed, exported_bundle: Bundle, tmp_path: Path) -> None:
    """As docs/serving.md says, with pip, which needs a package index: 110 to 140 s on two busy cores."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    without = {**os.environ, **OWN_PATH, "PYTHONPATH": ""}
    install = [python, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"]
    subprocess.run(install, cwd=packed.src, env=without, check=True)
    missing = subprocess.run([python, "-c", "import torch"], env=without, capture_output=True, text=True)
    assert "No module named 'torch'" in missing.stderr
    command = [str(tmp_path / "venv/bin/bentoml"), "serve", str(packed.folder)]
    check_server(command, tmp_path, {"PYTHONPATH": ""}, mine=exported_bundle, digits=Bundle.open("digits"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_package_packs_itself_into_the_store(packed: Packed, installed: Path, tmp_path: Path) -> None:
    """From no checkout; with one engine of two; and BentoML finds what it is told."""
    from uni_instruct.export.targets import export_engine

    bundle = random_bundle(tmp_path / "two", seed=1)
    for engine in ("onnx-fp32", "openvino-fp32"):
        export_engine(bundle, engine)
    environment = {**os.environ, **OWN_PATH, "PYTHONPATH": str(installed), "BENTOML_HOME": str(tmp_path / "home")}
    done = run_cli("package", bundle.path, "--engine", "openvino-fp32", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    tag, folder = first.split(",")[0].split(": ")
    assert last == f"next: bentoml serve {tag}, or bentoml containerize {tag}"
    assert folder == str(tmp_path / "home" / "bentos" / tag.replace(":", "/"))
    assert {str(engine_id) for engine_id in Bundle.open(f"{folder}/src/bundles/tiny").engines()} == {"openvino-fp32"}
    with zipfile.ZipFile(packed.wheel) as built, zipfile.ZipFile(f"{folder}/src/wheels/{packed.wheel.name}") as again:
        files = {name for name in built.namelist() if not name.endswith("/RECORD")}
        assert {name for name in again.namelist() if not name.endswith("/RECORD")} >= files
        assert all(built.read(name) == again.read(name) for name in files)
    shown = subprocess.run(
        [sys.executable, "-m", "bentoml", "get", tag, "--output", "path"], env=environment, capture_output=True, text=True
    )
    assert "".join(shown.stdout.split()) == folder  # BentoML breaks long lines


@pytest.mark.slow
def test_bentoml_imports_the_archive(packed: Packed, tmp_path: Path) -> None:
    archive = packed.folder.parent / "images.bento"
    environment = {**os.environ, **OWN_PATH, "BENTOML_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "bentoml", "import", str(archive)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = tmp_path / "bentos" / packed.facts["tag"].replace(":", "/")
    assert (stored / "src/requirements.txt").read_bytes() == (packed.src / "requirements.txt").read_bytes()
