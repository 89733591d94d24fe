"""Where the product raises errors that users meet, read from its source; and how a remedy's words are followed."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from builders.paths import ROOT

ERRORS = "errors.py"
# What is raised in the way of a file's name, which a reader adds (checkpoints/budget.py).
ALSO = {"MalformedFile"}


class Site(NamedTuple):
    """One place: its file, the function around it, its class of error, and both halves of its message, {} for each value."""

    path: str
    function: str
    error: str
    problem: str
    remedy: str

    @property
    def key(self) -> str:
        """The file and how the message begins; the function, where nothing but values is written there."""
        words = self.problem if re.search(r"[A-Za-z]{3}", self.problem.replace("{}", "")) else f"({self.function})"
        return f"{self.path}: {words[:64].strip()}"

    def fits(self, message: str) -> bool:
        """Whether the message may come from here."""
        parts = (".*".join(map(re.escape, half.split("{}"))) for half in (self.problem, self.remedy))
        return re.match("; ".join(parts), message, re.DOTALL) is not None


class Case(Protocol):
    """A case of the test: the file that its message is from, and how the message begins, or (the function)."""

    @property
    def path(self) -> str: ...

    @property
    def message(self) -> str: ...


@cache
def error_classes() -> frozenset[str]:
    """Names of the errors in errors.py, of those that other modules make of them, and of what becomes one."""
    names, grown = {"UniInstructError"} | ALSO, True
    classes = [node for path in modules() for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    while grown:
        found = {node.name for node in classes if {ast.unparse(base) for base in node.bases} & names}
        grown, names = not found <= names, names | found
    return frozenset(names)


def modules() -> Iterator[Path]:
    for folder in ("uni_instruct", "train", "export", "serve"):
        yield from sorted((ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def sites() -> tuple[Site, ...]:
    """Every call that makes such an error, in the order of files and lines."""
    return tuple(site for path in modules() if path.name != ERRORS for site in _sites_below(tree(path), path, ""))


@cache
def constants(path: Path) -> dict[str, str]:
    """A module's own texts by name, such as a remedy that several errors share."""
    assigned = [node for node in tree(path).body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    return {ast.unparse(node.targets[0]): template(node.value) for node in assigned}


def sites_of(case: Case) -> Iterator[Site]:
    """The places that a case says its message is from."""
    here = [site for site in sites() if site.path == case.path]
    if case.message.startswith("("):
        yield from (site for site in here if site.key.endswith(f": {case.message}"))
        return
    # '{} has {}' means that message where there is one, not all that begin so.
    exact = [site for site in here if site.problem == case.message]
    yield from exact or (site for site in here if site.problem.startswith(case.message))


def _sites_below(node: ast.AST, path: Path, function: str) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(child, ast.Call) and ast.unparse(child.func).rpartition(".")[2] in error_classes():
            said = {str(word.arg): template(word.value) for word in child.keywords}
            problem = template(child.args[0]) if child.args else said.get("problem", "{}")
            second = template(child.args[1]) if len(child.args) > 1 else ""
            remedy = said.get("remedy", second) or ("install " + said["extra"] if "extra" in said else "{}")
            error = ast.unparse(child.func).rpartition(".")[2]
            if remedy == "{}":
                written = [word.value for word in child.keywords if word.arg == "remedy"] + child.args[1:2]
                remedy = constants(path).get(ast.unparse(written[0]) if written else "", remedy)
            yield Site(path.relative_to(ROOT).as_posix(), inner, error, problem, remedy)
        yield from _sites_below(child, path, inner)


def template(node: ast.expr) -> str:
    """What an expression writes, with {} for whatever is no literal."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{}"


def first_choice(remedy: str) -> str:
    """'choose one of a, b' -> 'a'."""
    found = re.search(r"(?:choose one of|choose from|give one of) ([^,;]+)", remedy)
    assert found, remedy
    return found[1].strip()


def example(remedy: str) -> str:
    """'give a file such as grid.png' -> 'grid.png'."""
    found = re.search(r"such as (\S+)", remedy)
    assert found, remedy
    return found[1]


def without(arguments: list[str], option: str, values: int) -> list[str]:
    """The arguments without an option and its values."""
    at = arguments.index(option)
    return arguments[:at] + arguments[at + 1 + values :]


def with_value(arguments: list[str], option: str, value: str) -> list[str]:
    """The arguments with another value of an option, which is added where it is not given."""
    if option not in arguments:
        return [*arguments, option, value]
    at = arguments.index(option)
    return [*arguments[: at + 1], value, *arguments[at + 2 :]]
