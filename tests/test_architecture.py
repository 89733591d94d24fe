"""The house rules that a machine can hold: directions of imports, and what must run without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("train", "export", "serve")
# The core's rooms that are torch by nature.
TORCH_MODULES = (
    "uni_instruct.train.objective.custom_divergence",
    "uni_instruct.networks",
    "uni_instruct.sampler",
    "uni_instruct.engines.torch",
    "uni_instruct.evaluate.classifier",
    "uni_instruct.evaluate.classifier_extractor",
)


def modules_below(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


@pytest.mark.parametrize("folder", ["uni_instruct", *STAGES])
def test_imports_run_from_the_stages_to_the_core(folder: str) -> None:
    forbidden = {f"uni_instruct.{stage}" for stage in STAGES if stage != folder} | set(STAGES)
    assert modules_below(folder)
    for path in modules_below(folder):
        wrong = {name for name in imported_names(path) if any(name == f or name.startswith(f"{f}.") for f in forbidden)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_core_and_serve_import_with_torch_blocked() -> None:
    names = []
    for folder, package in (("uni_instruct", "uni_instruct"), ("serve", "uni_instruct.serve")):
        for path in modules_below(folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join((package, *(part for part in parts if part != "__init__"))))
    wanted = [name for name in names if not name.startswith(TORCH_MODULES) and not name.endswith("__main__")]
    assert len(wanted) > 30
    run_without_torch(f"import importlib\nfor name in {wanted!r}: importlib.import_module(name)")


def test_importing_the_command_line_imports_no_heavy_package() -> None:
    heavy = ("torch", "numpy", "PIL", "bentoml", "gradio")
    code = f"import sys, uni_instruct.cli\nassert not sys.modules.keys() & {set(heavy)}, sys.modules.keys() & {set(heavy)}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_stay_readable() -> None:
    """No file called after nothing in particular, none so long that it should be two."""
    for folder in ("uni_instruct", *STAGES):
        for path in modules_below(folder):
            assert path.stem not in ("utils", "helpers", "misc", "common"), path
            assert len(path.read_text().splitlines()) <= 350, f"{path} is too long"


def run_without_torch(code: str) -> None:
    """Runs code in a fresh interpreter in which importing torch fails."""
    block = "import sys\nsys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
