"""`dataset.json` as people and programs write it, drawn at random; what it says of each picture, or what is wrong with it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

Classes = dict[int, str | None]


@dataclass(frozen=True, kw_only=True)
class OddLabels:
    """words: what was drawn. file, content: the file. classes: of each level, or None where its folders decide.

    notes and faults: patterns that the data set's note, or its refusal, fits.
    """

    words: str
    file: str
    content: bytes
    classes: Classes | None
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What `dataset.json` holds, and what follows from it."""

    content: object
    classes: Classes | None = None
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


class _Drawn:
    """Pictures with a class each: by level their names and ids; two classes at least have one."""

    def __init__(self, rng: random.Random, names: dict[int, str]):
        self.rng, self.names = rng, names
        self.count = rng.randint(2, 4)
        self.ids = {level: place % self.count for place, level in enumerate(names)}

    def entries(self, **changed: object) -> list[list[object]]:
        """[[file, class], ...]; `first` in place of the first one's class."""
        pairs: list[list[object]] = [[name, self.ids[level]] for level, name in self.names.items()]
        if "first" in changed:
            pairs[0][1] = changed["first"]
        return pairs

    def numbered(self, shift: int = 0) -> Classes:
        return {level: str(number + shift) for level, number in self.ids.items()}

    @property
    def highest(self) -> int:
        return max(self.ids.values())


def _named(drawn: _Drawn) -> _Said:
    words = [f"kind {number}" for number in range(drawn.highest + 1)]
    classes: Classes = {level: words[number] for level, number in drawn.ids.items()}
    return _Said(content={"labels": drawn.entries(), "class_names": words}, classes=classes)


def _one_hot(drawn: _Drawn) -> _Said:
    entries = [
        [name, [float(number == drawn.ids[level]) for number in range(drawn.count)]] for level, name in drawn.names.items()
    ]
    return _Said(content={"labels": entries}, classes=drawn.numbered())


def _vectors(drawn: _Drawn) -> _Said:
    entries = [[name, [0.1, 0.5]] for name in drawn.names.values()]
    note = "vectors of 2 numbers and not one-hot: read without classes"
    return _Said(content={"labels": entries}, classes=dict.fromkeys(drawn.names), notes=(note,))


def _from_one(drawn: _Drawn) -> _Said:
    entries = [[name, drawn.ids[level] + 1] for level, name in drawn.names.items()]
    return _Said(content={"labels": entries}, classes=drawn.numbered(1), notes=("labels begin at 1: class 0 has no image",))


def _extra(drawn: _Drawn) -> _Said:
    """Labels of a picture that is not there: somebody copied a part."""
    note = r"1 label \([^)]*gone.png\) without an image"
    return _Said(content={"labels": [*drawn.entries(), ["gone.png", 0]]}, classes=drawn.numbered(), notes=(note,))


def _few_names(drawn: _Drawn) -> _Said:
    """One name for all classes: those names are of something else."""
    note = "has 1 class names for .* classes: ignored" if drawn.highest else ""
    content = {"labels": drawn.entries(), "class_names": ["kind 0"]}
    return _Said(content=content, classes=drawn.numbered(), notes=(note,) if note else ())


def _null(drawn: _Drawn) -> _Said:
    return _Said(content={"labels": None}, classes=dict.fromkeys(drawn.names))


def _plain(drawn: _Drawn) -> _Said:
    return _Said(content={"labels": drawn.entries()}, classes=drawn.numbered())


def _as_object(drawn: _Drawn) -> _Said:
    """{file: class}, which says the same."""
    return _Said(content={"labels": {name: drawn.ids[level] for level, name in drawn.names.items()}}, classes=drawn.numbered())


def _more_classes(drawn: _Drawn) -> _Said:
    return _Said(content={"labels": drawn.entries(), "num_classes": drawn.count + 2}, classes=drawn.numbered())


def _something_else(_: _Drawn) -> _Said:
    return _Said(content={"images": [], "annotations": []}, notes=("says nothing about labels",))


def _first_is(value: object, fault: str) -> Callable[[_Drawn], _Said]:
    return lambda drawn: _Said(content={"labels": drawn.entries(first=value)}, faults=(fault,))


def _missing(drawn: _Drawn) -> _Said:
    return _Said(content={"labels": drawn.entries()[1:]}, faults=("has no label in dataset.json",))


def _twice(drawn: _Drawn) -> _Said:
    name = next(iter(drawn.names.values()))
    return _Said(content={"labels": [*drawn.entries(), [name, 1]]}, faults=("has two labels in dataset.json, 0 and 1",))


def _beyond(drawn: _Drawn) -> _Said:
    return _Said(content={"labels": drawn.entries(first=7), "num_classes": 5}, faults=(r"label 7, outside the classes 0\.\.4",))


def _content(content: object, fault: str) -> Callable[[_Drawn], _Said]:
    return lambda _: _Said(content=content, faults=(fault,))


SAID: dict[str, Callable[[_Drawn], _Said]] = {
    "plain": _plain,
    "with names": _named,
    "one-hot": _one_hot,
    "other vectors": _vectors,
    "from 1": _from_one,
    "null": _null,
    "as an object": _as_object,
    "of one more file": _extra,
    "with one name": _few_names,
    "of more classes": _more_classes,
    "of something else": _something_else,
    "words": _first_is("cat", "label cat, which is not a class"),
    "a float": _first_is(1.0, "label 1.0, which is not a class"),
    "a truth": _first_is(True, "label true, which is not a class"),
    "negative": _first_is(-1, "label -1, which is not a class"),
    "a huge number": _first_is(10**30, "label 10+, which is not a class"),
    "nothing for one": _first_is(None, "label null, which is not a class"),
    "mixed": _first_is([0, 1], "label .*, which is not a (vector|class)"),
    "one missing": _missing,
    "two of one file": _twice,
    "beyond the classes": _beyond,
    "a number": _content({"labels": 3}, "are not a list of"),
    "of no file's name": _content({"labels": [[1, 0], [2, 0]]}, "are not a list of"),
    "triples": _content({"labels": [["a.png", 0, 1]]}, "are not a list of"),
    "a list at the top": _content([1], "is not a JSON object"),
    "no JSON": _content("{,", "is not JSON"),
    "classes in words": _content({"labels": None, "num_classes": "ten"}, "num_classes ten in .* is not a number"),
}
READ = [name for name, said in SAID.items() if not said(_Drawn(random.Random(0), {4: "a.png", 12: "b.png"})).faults]
WRONG = [name for name in SAID if name not in READ]


def labels_of(rng: random.Random, names: dict[int, str], root: str, kind: str) -> OddLabels:
    """`dataset.json` of that kind for those files (all below root): at the top, or beside what it is about."""
    below = bool(root) and rng.random() < 0.5
    style = rng.choice(["plain", "backslashes", "dots"])
    prefix = root if below and rng.random() < 0.7 else ""
    written = {level: _in_style(name.removeprefix(prefix), style) for level, name in names.items()}
    said = SAID[kind](_Drawn(rng, written))
    text = said.content if isinstance(said.content, str) else json.dumps(said.content, ensure_ascii=rng.random() < 0.5)
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
    return OddLabels(
        words=f"{kind}, {encoding}, {style}{', below' if below else ''}{', seen from there' if prefix else ''}",
        file=f"{root if below else ''}dataset.json",
        content=text.encode(encoding, "surrogatepass"),
        classes=said.classes,
        notes=said.notes,
        faults=said.faults,
    )


def _in_style(name: str, style: str) -> str:
    if style == "backslashes":
        return name.replace("/", "\\")
    return f"./{name}" if style == "dots" else name
