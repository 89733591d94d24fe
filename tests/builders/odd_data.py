"""Data sets as people have them, drawn by a seed, and what is right for each: pictures and their classes, or what is wrong.

What is right is known from how a set was made, by the rules that docs/data.md states, and not from reading it.
"""

import io
import os
import random
import tarfile
import unicodedata
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from builders.odd_labels import READ, WRONG, Classes, labels_of
from builders.odd_pictures import BROKEN, FORMS, Form, Size

ACCENT = "caf\u00e9"
NAMINGS = (
    ("cat", "dog", "red fox", "Zebra"),
    ("1", "2", "10", "03"),
    (ACCENT, unicodedata.normalize("NFD", "na\u00efve"), "\u732b", "\U0001f408 cat"),
    ("-a", "b%20c", "d'e", "g.h"),
    ("Cat", "cat", "CAT", "cat "),
)
DROPPINGS = ("__MACOSX/{}._1.png", "{}.DS_Store", "{}@eaDir/T.jpg", "{}.ipynb_checkpoints/1.png", "{}Thumbs.db", "{}._9.png")
OTHERS = ("readme.txt", "labels.csv", "film.mp4", "more.zip", "LICENSE", "notes.pdf", "array.npy", ".hidden.png", "scan.heic")
LEVELS = range(4, 255, 8)  # far enough apart for lossy forms
ONLY_ON_DISK, ONLY_BY_FOLDER = "on disk: ", "by folder: "


@dataclass(kw_only=True)
class OddData:
    """A data set on disk. classes: of each picture, by its level, the class's name, or None where there are no classes.

    passed_over and repeated: files and names that are counted and left out. notes: what must be said of it. faults: patterns,
    of which the refusal fits one; where there are none, it must be read.
    """

    path: Path
    size: Size
    drawn: list[str]
    classes: Classes
    channels: int
    passed_over: int
    repeated: int
    notes: list[str]
    faults: list[str]
    mixed_sizes: bool

    @property
    def words(self) -> str:
        """All that was drawn, for whoever reads a failed test."""
        return f"{self.path.name!r}: {'; '.join(self.drawn)}"


@dataclass
class _Making:
    """A set while it is drawn. files: by name, below the top; named: of each level the name, and links: name -> target."""

    rng: random.Random
    zipped: bool
    root: str
    size: Size
    drawn: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    pipes: list[str] = field(default_factory=list)
    named: dict[int, str] = field(default_factory=dict)
    classes: Classes = field(default_factory=dict)
    channels: int = 1
    passed_over: int = 0
    repeated: int = 0
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    mixed_sizes: bool = False

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def odd_data(seed: int, folder: Path) -> OddData:
    """The data set of that seed, written below the folder."""
    rng = random.Random(seed)
    making = _Making(
        rng, rng.random() < 0.5, rng.choice(["", "", "photos/", "a b/c/"]), rng.choice([(8, 8), (16, 16), (16, 8)])
    )
    making.drawn.append(f"{'archive' if making.zipped else 'folder'} below '{making.root}', pictures of {making.size}")
    _layout(making)
    _labels(making)
    for step in (_broken, _another_size, _others, _droppings, _links, _written_twice):
        step(making)
    place = rng.choice(["data", "my photos", "x,y", "100% \u00e9", "line\nbreak", "caf\udce9"])
    path = folder / (place + rng.choice([".zip", ".bin", ".ZIP", ".tar", ".TAR"]) if making.zipped else place)
    _write(making, path)
    facts = {name: value for name, value in vars(making).items() if name in OddData.__dataclass_fields__}
    return OddData(path=path, **facts)


def _layout(making: _Making) -> None:
    """Where the pictures are, and which classes that makes."""
    rng, count = making.rng, making.rng.randint(3, 12)
    kind = rng.choice(
        [*2 * ["beside each other", "class folders", "class folders", "one folder", "shards"], "splits", "loose ones"]
    )
    making.drawn.append(f"{count} pictures: {kind}")
    naming = rng.choice(NAMINGS)
    names, plain = (
        naming[: rng.randint(2, len(naming))],
        [f"{'' if kind == 'shards' else rng.choice(['', 'a', 'IMG_'])}"] * count,
    )
    deeper = "in/" if kind == "class folders" and making.chance(0.3) else ""
    forms = _forms(making)
    for place in range(count):
        level, form = LEVELS[place], rng.choice(forms)
        folder, class_name = {
            "beside each other": ("", None),
            "class folders": (f"{names[place % len(names)]}/{deeper}", names[place % len(names)]),
            "one folder": (f"{names[0]}/", names[0] if not making.zipped else None),
            "shards": (f"0000{place % 2}/", None),
            "splits": (f"{('train', 'Test')[place % 2]}/", None),
            "loose ones": ("" if place else f"{names[0]}/", None),
        }[kind]
        number = f"img{place % 2 * 1000 + place:08d}" if kind == "shards" else f"{plain[0]}{place}"
        _put(making, level, f"{folder}{number}", form, class_name)
    # On disk a folder that holds all pictures is a class by its name.
    if kind == "beside each other" and making.root and not making.zipped:
        making.classes = dict.fromkeys(making.classes, making.root.rstrip("/").rpartition("/")[2])
    if kind == "splits":
        making.faults.append(ONLY_BY_FOLDER + "has folders Test, train, which are parts of a data set")
    if kind == "shards":
        making.notes.append(ONLY_BY_FOLDER + "folders are numbered with their images: read without classes")
    if kind == "loose ones":
        (making.notes if making.zipped else making.faults).append(ONLY_BY_FOLDER + "beside them")


def _forms(making: _Making) -> list[Form]:
    """One form, some, or any."""
    kinds = making.rng.sample(sorted(FORMS), making.rng.choice([1, 3, 8]))
    making.drawn.append(" and ".join(kinds) if len(kinds) < 4 else "many forms")
    return [FORMS[kind] for kind in kinds]


def _put(making: _Making, level: int, name: str, form: Form, class_name: str | None) -> None:
    name += form.suffix
    making.files[making.root + name] = form.encode(level, making.size)
    making.named[level] = making.root + name
    making.classes[level] = None if class_name is None else unicodedata.normalize("NFC", class_name)
    making.channels = max(making.channels, form.channels)


def _labels(making: _Making) -> None:
    """A `dataset.json`, or none; and what remains of what the folders say."""
    kind = making.rng.choice(["", "", "", *making.rng.choices(READ, k=4), making.rng.choice(WRONG)])
    by_folder = True
    if kind:
        labels = labels_of(making.rng, making.named, making.root, kind)
        making.drawn.append(f"labels {labels.words}")
        making.files[labels.file] = labels.content
        by_folder = labels.classes is None and not labels.faults
        making.classes = labels.classes or making.classes
        making.notes, making.faults = [*making.notes, *labels.notes], [*making.faults, *labels.faults]
    for said in (making.notes, making.faults):
        said[:] = [words.removeprefix(ONLY_BY_FOLDER) for words in said if by_folder or not words.startswith(ONLY_BY_FOLDER)]


def _broken(making: _Making) -> None:
    if making.chance(0.12):
        kind = making.rng.choice(sorted(BROKEN))
        suffix, content = BROKEN[kind]
        _beside_a_picture(making, f"broken{suffix}", content(making.size))
        making.drawn.append(f"a broken file: {kind}")
        making.faults.append(r"broken\.\w+ in .* (cannot be read|has no label)")


def _another_size(making: _Making) -> None:
    if making.chance(0.1):
        level = making.rng.choice(sorted(making.named))
        suffix = os.path.splitext(making.named[level])[1]
        same = next(form for form in FORMS.values() if form.suffix == suffix)
        making.files[making.named[level]] = same.encode(level, (24, 24))
        making.drawn.append("one of another size")
        making.faults.append("bring them to one size|is .*x.*, other images are")
        making.mixed_sizes = True


def _others(making: _Making) -> None:
    """Files that are no pictures: some, or many."""
    names = making.rng.sample(OTHERS, making.rng.choice([0, 0, 1, 4]))
    names += [f"caption{number}.txt" for number in range(making.rng.choice([0, 0, 0, 0, 200]))]
    for name in names:
        _beside_a_picture(making, name, b"ftyp or other words")
        making.passed_over += 1
    if not making.zipped and making.chance(0.1):
        making.pipes.append(f"{making.root}pipe.png")
        making.passed_over += 1
    making.drawn.append(f"{making.passed_over} other files{' and a pipe' if making.pipes else ''}")


def _droppings(making: _Making) -> None:
    for pattern in making.rng.sample(DROPPINGS, making.rng.choice([0, 1, 3])):
        making.files[pattern.format(making.root)] = b"\0\5\x16\7"
        making.drawn.append(f"dropping {pattern.format(making.root)}")


def _links(making: _Making) -> None:
    """To what is there already, and to what is gone."""
    if making.zipped or making.chance(0.5):
        return
    name = making.rng.choice(sorted(making.named.values()))
    kind = making.rng.choice(["file", "folder", "above", "file", "folder", "above", "gone"])
    making.drawn.append(f"a link: {kind}")
    folder, _, base = name.rpartition("/")
    if kind == "gone":
        making.links[f"{folder}/gone.png".lstrip("/")] = "nowhere.png"
        making.faults.append(r"gone\.png in .* (cannot be read|has no label)")
        return
    target = {"file": base, "folder": ".", "above": ".."}[kind]
    making.links[f"{folder}/link{'.png' if kind == 'file' else ''}".lstrip("/")] = target
    making.repeated += 1


def _written_twice(making: _Making) -> None:
    """A name that stands twice in a zip, as 'zip' of several programs leave it."""
    if making.zipped and making.chance(0.2):
        making.again.append(making.rng.choice(sorted(making.named.values())))
        making.repeated += 1
        making.drawn.append(f"{making.again[0]} twice")


def _beside_a_picture(making: _Making, name: str, content: bytes) -> None:
    folder = making.rng.choice(sorted(making.named.values())).rpartition("/")[0]
    making.files[f"{folder}/{name}".lstrip("/")] = content


def _write(making: _Making, path: Path) -> None:
    if path.suffix.lower() == ".tar":
        with tarfile.open(path, "w") as tar:
            for name in [*making.again, *making.files]:
                entry = tarfile.TarInfo(name)
                entry.size = len(making.files[name])
                tar.addfile(entry, io.BytesIO(making.files[name]))
        return
    if making.zipped:
        method = making.rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        names = [*making.again, *making.files]
        with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name that stands twice
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), making.files[name], method)
        return
    path.mkdir()
    for name, content in making.files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    for name, target in making.links.items():
        os.symlink(target, path / name)
    for name in making.pipes:
        os.mkfifo(path / name)
