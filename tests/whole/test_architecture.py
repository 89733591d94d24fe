"""The house rules that a machine can hold: imports, sizes, one name for one thing, and what must run without torch."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders.paths import ROOT

STAGES = ("train", "export", "serve")
MODULE_LINES, FUNCTION_LINES = 330, 45
# The core's rooms that are torch by nature.
TORCH_MODULES = (
    "uni_instruct.networks",
    "uni_instruct.sampler",
    "uni_instruct.engines.torch",
    "uni_instruct.engines.compiled.torch_",
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
                assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{path}: {node.name} is too long"


# Where public signatures may say Any, and why: whatever else passes between modules has a type.
ANY = {
    "uni_instruct/checkpoints/": "what other projects' files hold",
    "uni_instruct/commands/inspect_checkpoint.py": "the same, shown",
    "uni_instruct/cli.py": "click's own signature",
    "uni_instruct/commands/option_types.py": "click's own signature",
    "uni_instruct/commands/compare.py": "options of scoring, as click hands them over",
    "uni_instruct/engines/tensorrt.py": "a package without types",
    "uni_instruct/sampling/ray_pool.py": "a package without types",
    "uni_instruct/networks/group_norm.py": "the context of torch's autograd",
    "uni_instruct/schedule.py": "a number, an array or a tensor",
    "uni_instruct/spec.py": "arguments of networks, by name",
    "train/config.py": "a recipe as YAML, and arguments of networks",
    "train/recipe.py": "fields of any dataclass",
    "train/recipe_keys.py": "fields of any dataclass",
    "train/objective/": "functions of users, and states",
    "train/loop.py": "states, as torch saves them",
    "train/run.py": "states, as torch saves them",
    "train/stages/": "states, as torch saves them",
    "train/optimization/": "states, as torch saves them",
    "train/monitoring/health.py": "states, as torch saves them",
}


def test_no_seam_is_any_but_where_the_table_says_why() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in all_modules() if any(public_any(ast.parse(path.read_text()).body))}
    assert {name for name in found if not name.startswith(tuple(ANY))} == set()
    assert [place for place in ANY if not any(name.startswith(place) for name in found)] == [], (
        "the table has more than it needs"
    )


def public_any(body: list[ast.stmt]) -> Iterator[str]:
    """Public functions, methods and fields with an annotation that says Any."""
    for node in body:
        name = getattr(node, "name", "") or getattr(getattr(node, "target", None), "id", "")
        if name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_any(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [argument.annotation for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
            if any(map(says_any, [*given, node.returns])):
                yield name
        elif isinstance(node, ast.AnnAssign) and says_any(node.annotation):
            yield name


def says_any(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(isinstance(part, ast.Name) and part.id == "Any" for part in ast.walk(annotation))


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


# What may import what in train/ and serve/, from the bottom to the top. A room is a folder or a file.
TRAIN_ROOMS: dict[str, tuple[str, ...]] = {
    "recipe_file": (),
    "recipe_keys": (),
    "rng": (),
    "run_lock": (),
    "objective": ("recipe_keys",),
    "config": ("objective", "recipe_file", "recipe_keys"),
    "recipe": ("config", "objective", "recipe_file", "recipe_keys"),
    "recipe_changes": ("config", "recipe"),
    "data_fingerprint": ("recipe_changes",),
    "scoring_choice": ("config",),
    "recipe_help": ("config", "recipe", "recipe_keys"),
    "optimization": ("config", "recipe", "recipe_keys", "rng"),
    "monitoring": ("optimization", "recipe_file", "run_lock"),
    "stages": ("config", "monitoring", "objective", "optimization"),
    "run": ("config", "monitoring", "optimization", "recipe", "recipe_changes", "run_lock"),
    "loop": ("config", "monitoring", "optimization", "rng", "run"),
    "card": ("config",),
    "plan": ("config", "monitoring", "objective", "stages"),
    "dry_run": ("config", "objective", "optimization", "plan", "recipe_keys", "rng", "stages"),
    "preflight": (
        *("config", "data_fingerprint", "dry_run", "optimization", "plan", "recipe_changes"),
        *("run", "run_lock", "scoring_choice"),
    ),
    "report": ("config", "dry_run", "monitoring", "optimization", "plan", "recipe"),
    "lab": (
        *("config", "scoring_choice", "monitoring", "objective", "optimization"),
        *("plan", "recipe", "recipe_keys", "report", "run_lock"),
    ),
    "pipeline": (
        *("card", "config", "scoring_choice", "loop", "objective", "optimization"),
        *("plan", "report", "rng", "run", "data_fingerprint", "stages"),
    ),
    "api": ("pipeline", "recipe"),
    "commands": (
        *("card", "dry_run", "lab", "monitoring", "optimization", "pipeline", "preflight"),
        *("recipe", "recipe_help", "recipe_keys", "report", "run_lock"),
    ),
}

SERVE_ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "metrics": (),
    "api_keys": (),
    "model_sources": (),
    "load_test": (),
    "settings": ("api_keys", "model_sources"),
    "process": ("settings",),
    "batching": ("errors", "metrics"),
    "http": ("api_keys", "batching", "errors", "metrics", "process", "settings"),
    "models": ("batching", "errors", "metrics", "model_sources", "process", "settings"),
    "routes": ("batching", "errors", "http", "metrics", "models"),
    "demo": ("errors", "http", "models", "routes"),
    "openapi": ("demo", "routes"),
    "app": ("demo", "errors", "http", "metrics", "models", "openapi", "process", "routes", "settings"),
    "service": ("app", "metrics", "models", "process", "routes", "settings"),
    "ray_serve": ("app", "model_sources", "settings"),
    "packaging": ("demo", "settings"),
    "commands": ("api_keys", "load_test", "model_sources", "packaging", "process", "settings"),
}
STAGE_ROOMS = {"train": TRAIN_ROOMS, "serve": SERVE_ROOMS}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count: a circle is a circle, also where it only closes when it is called."""
    graph = import_graph()
    assert len(graph) > 150
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_a_circle_is_found_through_a_package_and_inside_a_function(tmp_path: Path) -> None:
    """The graph of three files, of which the last closes a circle with the package that holds the first."""
    files = {
        "a/__init__.py": "from a.first import f",
        "a/first.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.second\ndef f():\n    from b import g",
        "a/second.py": "from a import first",
        "b.py": "import a.second",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    paths = {"a": "a/__init__.py", "a.first": "a/first.py", "a.second": "a/second.py", "b": "b.py"}
    graph = {name: imported_modules(name, tmp_path / path, set(paths)) for name, path in paths.items()}
    assert graph == {"a": {"a.first"}, "a.first": {"b"}, "a.second": {"a.first"}, "b": {"a", "a.second"}}


@pytest.mark.parametrize("stage", STAGE_ROOMS)
def test_rooms_import_what_their_row_says_and_nothing_above_them(stage: str) -> None:
    rooms = STAGE_ROOMS[stage]
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module, imports in import_graph().items():
        if room := room_of(module, stage):
            found[room] |= {other for name in imports if (other := room_of(name, stage)) and other != room}
    assert found == {room: set(allowed) for room, allowed in rooms.items()}
    order = list(rooms)
    for number, (room, allowed) in enumerate(rooms.items()):
        assert set(allowed) <= set(order[:number]), f"{room} imports a room above it"


def room_of(module: str, stage: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["uni_instruct", stage] and len(parts) > 2 else None


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports."""
    paths = {module_name(path): path for path in all_modules()}
    return {name: imported_modules(name, path, set(paths)) for name, path in paths.items()}


def module_name(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    above = ("uni_instruct",) if folder == "uni_instruct" else ("uni_instruct", folder)
    return ".".join((*above, *(part for part in parts if part != "__init__")))


def imported_modules(name: str, path: Path, known: set[str]) -> set[str]:
    """Of the known modules those that one imports, with the packages around them that it is not in itself."""
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in known else str(node.module) for module in whole}
    around = {module[:dot] for module in found for dot in range(len(module)) if module[dot] == "."}
    inside = {package for package in around if f"{name}.".startswith(f"{package}.")}
    return ((found | around - inside) & known) - {name}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node but what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from runtime_nodes(child)


# Room -> the extras with which it is used: each of them must bring what the room imports. Elsewhere only the core's
# dependencies may be imported.
ROOMS = {
    "serve": ("serve",),
    "export": ("export",),
    "train": ("train",),
    "uni_instruct/checkpoints": ("train", "export", "evaluate"),
    "uni_instruct/commands/benchmark_report.py": ("benchmark",),
    "uni_instruct/data": ("train", "evaluate"),
    "uni_instruct/engines/onnxruntime.py": ("serve", "export"),
    "uni_instruct/engines/openvino.py": ("serve", "export"),
    "uni_instruct/engines/openvino_file.py": ("serve", "export"),
    # Whichever of the two is installed.
    "uni_instruct/engines/benchmark/peak.py": (),
    # Used where torch is there already.
    "uni_instruct/engines/hardware/threads.py": (),
    "uni_instruct/engines/torch.py": ("train", "export", "evaluate"),
    "uni_instruct/engines/compiled/torch_worker.py": ("train", "export", "evaluate"),
    "uni_instruct/engines/compiled/torch_images.py": ("train", "export", "evaluate"),
    "uni_instruct/engines/compiled/torch_library.py": ("train", "export", "evaluate"),
    "uni_instruct/evaluate": ("evaluate",),
    "uni_instruct/hub.py": ("hub",),
    "uni_instruct/networks": ("train", "export", "evaluate"),
    "uni_instruct/sampler.py": ("train", "export", "evaluate"),
    "uni_instruct/schedule.py": ("train", "export", "evaluate"),
}
# Files that also import what is optional even where their room is used, and the extra that brings it.
OPTIONAL = {
    "train/monitoring/trackers.py": "trackers",
    "serve/ray_serve.py": "ray-serve",
    "uni_instruct/system/ray_cluster.py": "ray",
}
# Where a distribution is not called as what is imported from it.
DISTRIBUTIONS = {"PIL": "pillow", "markdown_it": "markdown-it-py", "sklearn": "scikit-learn", "yaml": "pyyaml"}


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


def test_every_file_on_the_map_is_where_it_says() -> None:
    """docs/architecture.md names files by their path, or by their name where a heading or a line says the folder."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    present = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert len(named) > 60
    missing = {name for name in named if not any(path == name or path.endswith(f"/{name}") for path in present)}
    assert not missing
