"""docs/python.md: its blocks run as they stand; what it says of imports, names and threads holds."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uni_instruct
from builders.paths import ROOT
from uni_instruct.bundle import Bundle

PAGE = ROOT / "docs" / "python.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_block_runs_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    # What the page says in comments of what is printed.
    for line in (
        "(100, 8, 8, 1) uint8",
        "class cat is neither a class name nor an id in 0..9; ",
        "seed -1 is not an integer in [0, 2**63); ",
        "generator 'digits' has 10 classes, but no class ids were given; ",
        "noise is float64, not float32; ",
        "images are float64 [100, 8, 8, 1] from -1 to 1, not uint8 [N, H, W, C]; convert floats ",
        "runs/mine/generator 1\n",
        "(64, 8, 8, 1) [0 1 2]",
    ):
        assert line in printed
        assert line.strip() in PAGE.read_text() or line.startswith("(64")
    one, other = (Bundle.open(tmp_path / "runs" / name / "generator") for name in ("mine", "other"))
    assert one.weights_sha256 != other.weights_sha256
    assert (tmp_path / "threes.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_in_a_thread_is_that_of_the_main_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own training, once more, in the thread of the page's other block."""
    monkeypatch.chdir(tmp_path)
    (training,) = (block for block in blocks() if "tiny = {" in block)
    (threaded,) = (block for block in blocks() if "ThreadPoolExecutor" in block)
    names: dict[str, object] = {}
    exec(training, names)
    exec(threaded.replace("runs/other", "runs/threaded").replace('"loop.seed": 1', ""), names)
    one, other = (Bundle.open(tmp_path / "runs" / name / "generator") for name in ("mine", "threaded"))
    assert one.weights_sha256 == other.weights_sha256


def test_importing_the_package_is_instant_and_complete() -> None:
    code = (
        "import sys, uni_instruct\n"
        "assert not {'torch', 'numpy', 'click'} & sys.modules.keys()\n"
        "assert set(uni_instruct._EXPORTED) <= set(dir(uni_instruct))\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "from uni_instruct import *\n"
        "assert callable(open_engine) and callable(train_recipe)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", uni_instruct._EXPORTED)
def test_no_exported_name_is_a_module_s(name: str) -> None:
    assert callable(getattr(uni_instruct, name))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"uni_instruct.{name}")
    assert f"`{name}" in PAGE.read_text()


def test_making_images_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from uni_instruct import *\n"
        "assert generate_images(open_engine('digits', 'onnx'), [7]).shape == (1, 8, 8, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'uni_instruct' has no attribute 'generate_pictures'"):
        uni_instruct.generate_pictures  # type: ignore[attr-defined]  # noqa: B018


def test_the_types_are_those_of_the_table() -> None:
    """The stub, which type checkers and editors read, names each export from the module that the table names."""
    stub = ast.parse((ROOT / "uni_instruct" / "__init__.pyi").read_text())
    typed = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert typed == uni_instruct._EXPORTED
