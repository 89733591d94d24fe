"""The house rules that a machine can hold: imports, sizes, one name for one thing, and what must run without torch."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("train", "export", "serve")
MODULE_LINES, FUNCTION_LINES = 330, 45
LONGER = {("train/commands/train.py", "train"), ("train/stages/distillation.py", "__init__")}
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


def test_modules_and_functions_stay_readable() -> None:
    """No file called after nothing in particular, none so long that it should be two, no function longer than a screen."""
    for path in all_modules():
        assert path.stem not in ("utils", "helpers", "misc", "common"), path
        text = path.read_text()
        assert len(text.splitlines()) <= MODULE_LINES, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                short = node.end_lineno - node.lineno < FUNCTION_LINES
                assert short or (str(path.relative_to(ROOT)), node.name) in LONGER, f"{path}: {node.name} is too long"


def test_a_public_class_or_table_has_one_name_of_its_own() -> None:
    """Who reads a name must know what it means, wherever it stands."""
    homes: dict[str, list[str]] = {}
    for path in all_modules():
        for name in public_classes_and_tables(ast.parse(path.read_text())):
            homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert len(homes) > 100
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def public_classes_and_tables(module: ast.Module) -> Iterator[str]:
    """Classes, type aliases, and tables: names in capitals that are bound to a container."""
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            names = [node.target.id] if is_table_or_alias(node.target.id, node.value) else []
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            names = [node.targets[0].id] if is_table_or_alias(node.targets[0].id, node.value) else []
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def is_table_or_alias(name: str, value: ast.expr) -> bool:
    container = isinstance(value, ast.Dict | ast.DictComp | ast.Tuple | ast.List | ast.Set) or (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("dict", "frozenset", "tuple")
    )
    return container if name.isupper() else name[0].isupper()


# Room -> the extras with which it is used: each of them must bring what the room imports. Elsewhere only the core's
# dependencies may be imported.
ROOMS = {
    "serve": ("serve",),
    "export": ("export",),
    "train": ("train",),
    "uni_instruct/checkpoints": ("train", "export", "evaluate"),
    "uni_instruct/data": ("train", "evaluate"),
    "uni_instruct/engines/onnxruntime.py": ("serve", "export"),
    "uni_instruct/engines/torch.py": ("train", "export", "evaluate"),
    "uni_instruct/evaluate": ("evaluate",),
    "uni_instruct/float32.py": ("train", "export", "evaluate"),
    "uni_instruct/hub.py": ("hub",),
    "uni_instruct/networks": ("train", "export", "evaluate"),
    "uni_instruct/sampler.py": ("train", "export", "evaluate"),
    "uni_instruct/schedule.py": ("train", "export", "evaluate"),
}
# Files that also import what is optional even where their room is used, and the extra that brings it.
OPTIONAL = {"train/monitoring/trackers.py": "trackers"}
# Where a distribution is not called as what is imported from it.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {distribution(line) for line in project["dependencies"]}
    extras = {name: {distribution(line) for line in lines} for name, lines in project["optional-dependencies"].items()}
    seen = set()
    for path in all_modules():
        place = path.relative_to(ROOT).as_posix()
        room = next((room for room in ROOMS if place == room or place.startswith(f"{room}/")), None)
        needed = {DISTRIBUTIONS.get(name, name.replace("_", "-").lower()) for name in foreign_packages(path)}
        seen |= needed
        needed -= extras[OPTIONAL[place]] if place in OPTIONAL else set()
        for extra in ROOMS[room] if room else ():
            assert needed <= core | extras[extra], f"{place}: {needed - core - extras[extra]} is not declared in '{extra}'"
        assert room or needed <= core, f"{place}: {needed - core} is no dependency of the core"
    assert {"torch", "torch-fidelity", "bentoml", "numpy"} <= seen


def foreign_packages(path: Path) -> set[str]:
    """Packages, neither Python's nor this one, that a file imports by statement or by `import_module` with a literal name."""
    names = imported_names(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            texts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            names |= {str(text) for text in texts if str(text).replace(".", "_").isidentifier()}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"uni_instruct"}


def distribution(requirement: str) -> str:
    """'Foo_Bar[extra]>=1' -> 'foo-bar'."""
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].replace("_", "-").lower()


def all_modules() -> list[Path]:
    return [path for folder in ("uni_instruct", *STAGES) for path in modules_below(folder)]


def run_without_torch(code: str) -> None:
    """Runs code in a fresh interpreter in which importing torch fails."""
    block = "import sys\nsys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
