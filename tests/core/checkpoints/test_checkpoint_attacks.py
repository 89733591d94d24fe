"""The attacks that are known against pickles, torch files and zips: each is refused, runs nothing, takes no memory."""

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders.checkpoint_worker import Outcome, Worker
from builders.checkpoints import tiny_peer, write_edm_pickle
from builders.pickles import (
    LOAD,
    MAGIC,
    array,
    call,
    doubled,
    inside,
    loaded,
    name,
    nested,
    network,
    number,
    numpy_dtype,
    safetensors,
    scalar,
    stored,
    stream,
    tensor,
    text,
    weights,
    whole,
    zipped,
)

Made = bytes | Callable[[Path], None]


def shared_header(path: Path) -> None:
    """Two entries of a zip whose bytes are the same: the directory sends the second name to the first one's place."""
    zipped(whole(b"}", text("w"), tensor(stored()), b"s"), entries={"archive/data/0": b"\0" * 16, "archive/data/1": b""})(path)
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = struct.pack("<I", 0)
    path.write_bytes(content)


def twice(path: Path) -> None:
    zipped(whole(b"}", text("w"), tensor(stored()), b"s"))(path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"\1" * 16)


def huge_directory(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(25_000):
            archive.writestr(f"archive/{'x' * 150}{index}", b"")


def wrong_checksum(path: Path) -> None:
    zipped(weights(tensor(stored())))(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\0" * 16, b"\1" * 16))


def wrong_pickle(path: Path) -> None:
    zipped(weights(tensor(stored())))(path)
    path.write_bytes(path.read_bytes().replace(text("w"), text("v")))


FOREIGN = r"names '{}', which is not among the globals of a checkpoint; nothing in it was run"
REDUCE = {
    "os.system": call("os", "system"),
    "posix.system": call("posix", "system"),
    "subprocess.Popen": call("subprocess", "Popen"),
    "builtins.eval": call("builtins", "eval", "open('never', 'w')"),
    "builtins.exec": call("builtins", "exec", "open('never', 'w')"),
    "builtins.__import__": call("builtins", "__import__", "antigravity"),
    "builtins.getattr": name("builtins", "getattr") + name("collections", "OrderedDict") + text("__init__") + b"\x86R",
    "importlib.import_module": call("importlib", "import_module", "antigravity"),
    "pickle.loads": call("pickle", "loads"),
    "torch.load": call("torch", "load"),
    "torch.hub.load": call("torch.hub", "load"),
    "numpy.load": call("numpy", "load"),
    "torch.storage._load_from_bytes.__globals__": name("torch.storage", "_load_from_bytes.__globals__"),
    "collections.OrderedDict.__reduce__": name("collections.OrderedDict", "__reduce__"),
    "copyreg._reconstructor": call("copyreg", "_reconstructor"),
    "types.CodeType": call("types", "CodeType"),
    "runpy._run_code": call("runpy", "_run_code"),
    "builtins.bytearray": call("builtins", "bytearray"),
}
# Names of globals that are refused wherever they stand.
PLACES: dict[str, Callable[[bytes], Made]] = {
    "fact": inside,
    "weight": lambda evil: whole(b"}", text("ema"), network(evil), b"s"),
    "nested stream": lambda evil: whole(b"}", text("ema"), network(tensor(stream(4, value=whole(evil)))), b"s"),
    "nested machine": lambda evil: whole(b"}", text("ema"), network(tensor(stream(4, system=whole(evil)))), b"s"),
    "nested keys": lambda evil: whole(b"}", text("ema"), network(tensor(stream(4, keys=whole(evil)))), b"s"),
    "nested pickle": lambda evil: whole(b"}", text("ema"), network(tensor(loaded(whole(evil)))), b"s"),
    "zip": lambda evil: zipped(weights(evil)),
    "storage type": lambda evil: zipped(weights(tensor(stored(kind=evil)))),
}
ATTACKS: dict[str, tuple[Made, str]] = {
    **{f"reduce {key}": (inside(code), FOREIGN.format(key.replace(".", r"\."))) for key, code in REDUCE.items()},
    **{f"system in {place}": (make(call("os", "system")), FOREIGN.format(r"os\.system")) for place, make in PLACES.items()},
    "global of protocol 2": (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", FOREIGN.format(r"os\.system")),
    "stack global from the memo": (
        inside(b"}(", text("os"), b"q\x07", text("system"), b"q\x08uh\x07h\x08\x93"),
        FOREIGN.format(r"os\.system"),
    ),
    "allowed names in a nested stream": (
        whole(b"}", text("ema"), network(tensor(stream(4, value=whole(name("collections", "OrderedDict"), b")R")))), b"s"),
        r"names 'collections\.OrderedDict'",
    ),
    "global that is no text": (inside(text("os"), b"K\x01\x93"), "names 'os' 'int', which cannot be a global"),
    "global with control characters": (inside(call("os\x1b[2J\n", "system")), r"names 'os\\x1b\[2J\\n\.system'"),
    "global with a long name": (inside(call("o" * 1_000_000, "system")), r"names 'o{80}\.\.\.' 'system', which cannot be"),
    "inst": (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "uses pickle's INST"),
    "obj": (whole(b"(", name("collections", "OrderedDict"), b"o"), "uses pickle's OBJ"),
    "newobj_ex": (whole(name("dnnlib.util", "EasyDict"), b")}\x92"), "uses pickle's NEWOBJ_EX"),
    "newobj of a function": (whole(name("torch.storage", "_load_from_bytes"), b")\x81"), "makes an object of 'torch.storage"),
    "newobj with arguments": (whole(name("dnnlib.util", "EasyDict"), b"N\x85\x81"), "makes an object of 'EasyDict'"),
    "reduce of a class": (whole(name("dnnlib.util", "EasyDict"), b")R"), "calls 'EasyDict', which is not a function"),
    "reduce of a value": (whole(text("os.system"), b")R"), "calls a str, which is not a function"),
    "build on a function": (
        whole(name("torch._utils", "_rebuild_tensor_v2"), b"}", text("call"), b"K\x01sb"),
        "gives a state to a StandIn",
    ),
    "build on a dict": (whole(b"}}", text("__class__"), b"K\x01sb"), "has a dict with attributes"),
    "build twice": (inside(name("torch.nn.modules.container", "ModuleDict"), b")\x81}b}b"), "ModuleDict with a broken state"),
    "bare function": (inside(name("torch._utils", "_rebuild_tensor_v2")), "has the bare function or class torch._utils"),
    "extension code 1": (whole(b"\x82\xf0", text("true"), b"\x85R"), "uses pickle's EXT1"),
    "extension code 2": (whole(b"\x83\xf0\x00", text("true"), b"\x85R"), "uses pickle's EXT2"),
    "extension code 4": (whole(b"\x84\xf0\x00\x00\x00", text("true"), b"\x85R"), "uses pickle's EXT4"),
    "persistent id": (inside(text("os.system"), b"Q"), "refers to an object outside itself by a persistent id"),
    "persistent id as text": (whole(b"Pos.system\n"), "uses pickle's PERSID"),
    "persistent id of a class": (
        zipped(weights(b"(" + text("module") + text("os.system") + text("a.py") + text("1/0") + b"tQ")),
        "has a persistent id that is not torch's",
    ),
    "persistent id of something": (zipped(weights(text("os.system") + b"Q")), "has a persistent id that is not torch's"),
    "buffers from outside": (whole(b"\x97\x98"), "uses pickle's NEXT_BUFFER"),
    "unknown opcode": (whole(b"\xff"), "uses pickle's unknown opcode 0xff"),
    "memo bomb of lists": (inside(doubled(60, b"]", b"](@@@@@@@@@@e")), "asks for more than 1,000,000 values"),
    "memo bomb of tuples": (inside(doubled(60, b")", b"(@@@@@@@@@@t")), "asks for more than 1,000,000 values"),
    "memo bomb of small arrays": (
        inside(b"](", array(numpy_dtype("f4"), b"K\x04\x85", b"C\x10" + b"\0" * 16), b"q\x01", b"h\x01" * 300_000, b"e"),
        "asks for more than 1,000,000 values",
    ),
    "memo bomb of weights": (
        whole(
            b"}(",
            text("a"),
            tensor(stream(1000), shape=b"M\xe8\x03\x85"),
            b"q\x01",
            *(text(f"b{n}") + b"h\x01" for n in range(50)),
            b"u",
        ),
        "asks for more than [0-9,]+ bytes of networks",
    ),
    "memo bomb of keys": (inside(b"(", doubled(60, b")", b"(@@t"), b"}h\x05Nst"), "has a key of type tuple"),
    "value in itself": (inside(b"]q\x01h\x01a"), "has a value that contains itself"),
    "module in itself": (inside(b"}q\x01", text("_modules"), b"h\x01s"), "has a value that contains itself"),
    "dup": (whole(b"]" + b"2" * 50), "uses pickle's DUP"),
    "set made again and again": (
        inside(
            b"](", *(text(f"k{n}") for n in range(1000)), b"eq\x01](", (name("builtins", "set") + b"h\x01\x85R") * 3000, b"e"
        ),
        "asks for more than 1,000,000 opcodes",
    ),
    "text encoded again and again": (
        inside(
            text("a" * 1_000_000), b"q\x01](", (name("_codecs", "encode") + b"h\x01" + text("latin1") + b"\x86R") * 100, b"e"
        ),
        "asks for more than 67,108,864 bytes of text",
    ),
    "storage read again and again": (
        whole(b"](", LOAD, b"q\x01", stream(256).removeprefix(LOAD)[:-2], b"q\x02\x85R", b"h\x01h\x02\x85R" * 50, b"e"),
        "asks for more than [0-9,]+ bytes of storages",
    ),
    "keys that collide": (
        inside(b"}(", *(number(n << 20) + b"N" for n in range(30_000)), b"u"),
        "asks for more than 20,000 keys that are numbers",
    ),
    "key of one hash": (inside(b"}", number((1 << 61) - 1), b"Ns"), "has a key of type int"),
    "key that is a float": (inside(b"}G", struct.pack(">d", 1.0), b"Ns"), "has a key of type float"),
    "deep lists": (inside(nested(100_000, b"](", b"e")), "nests values deeper than 100"),
    "deep tuples": (inside(nested(100_000, b"", b"\x85")), "nests values deeper than 100"),
    "deep lists by the memo": (
        inside(b"](", nested(60, b"](", b"e"), b"q\x01", b"](" * 60, b"h\x01", b"e" * 60, b"e"),
        "nests values deeper than 100",
    ),
    "deep marks": (inside(b"(" * 200_000), "is not a whole pickle"),
    "deep modules": (
        inside(
            nested(
                3000,
                name("torch_utils.persistence", "_reconstruct_persistent_obj")
                + b"}("
                + text("type")
                + text("class")
                + text("class_name")
                + text("A")
                + text("state")
                + b"}"
                + text("a"),
                b"su\x85R",
            )
        ),
        "nests values deeper than 100",
    ),
    "many opcodes": (whole(b"](" + b"N" * 1_100_000 + b"e"), "asks for more than 1,000,000 opcodes"),
    "many sets": (whole(b"](" + b"\x8f" * 1_100_000 + b"e"), "asks for more than 1,000,000 opcodes"),
    "long unicode": (whole(b"\x8d" + struct.pack("<Q", 1 << 62)), "asks for more than 67,108,864 bytes of text"),
    "long unicode of 4 GB": (whole(b"X\xff\xff\xff\xff"), "asks for more than 67,108,864 bytes of text"),
    "long text within limits": (whole(b"X\x00\x00\x00\x02"), "ends too early"),
    "long bytes": (whole(b"\x8e" + struct.pack("<Q", 1 << 62)), "asks for more than 67,108,864 bytes of text"),
    "long bytearray": (whole(b"\x96" + struct.pack("<Q", 1 << 40)), "asks for more than 67,108,864 bytes of text"),
    "long storage": (whole(name("torch.storage", "_load_from_bytes"), b"\x8e", struct.pack("<Q", 1 << 62)), "ends too early"),
    "long frame": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.", "ends too early: a frame"),
    "long integer": (whole(b"\x8b\xff\xff\xff\x7f"), "uses pickle's LONG4"),
    "integer of 255 bytes": (whole(b"\x8a\xff" + b"\x7f" * 255), "has an integer of 255 bytes"),
    "memo of 4 billion": (whole(b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff"), "recalls value 4294967294, which does not exist"),
    "protocol 255": (b"\x80\xffN.", "is a pickle of an unknown protocol"),
    "storage of 2^62 elements": (
        zipped(weights(tensor(stored(number(1 << 62))))),
        "asks for more than [0-9,]+ bytes of storages",
    ),
    "storage of -1 elements": (zipped(weights(tensor(stored(number(-1))))), "has a storage of '-1' elements"),
    "storage of 4 or 3 elements": (
        zipped(weights(tensor(stored()) + tensor(stored(b"K\x03")) + b"\x86")),
        "describes storage '0' in two ways",
    ),
    "storage larger than its entry": (
        zipped(weights(tensor(stored(b"K\x08"), shape=b"K\x08\x85"))),
        "has a storage whose bytes are missing",
    ),
    "storage that is not there": (zipped(weights(tensor(stored(key="../../data.pkl")))), "lacks storage '../../data.pkl'"),
    "checksum": (wrong_checksum, "has a storage that does not match its checksum"),
    "checksum of the pickle": (wrong_pickle, "has a pickle that does not match its checksum"),
    "stream of another size": (
        inside(tensor(stream(4, end=struct.pack("<q", 5) + b"\0" * 20))),
        "has 5 elements in a storage of 4",
    ),
    "stream of another kind": (
        inside(tensor(stream(4).replace(number(MAGIC), number(MAGIC + 1)))),
        "has a storage that is not a torch stream",
    ),
    "stream with more behind it": (
        inside(tensor(stream(4, end=struct.pack("<q", 4) + b"\0" * 17))),
        "has 1 bytes after its end",
    ),
    "stream with other storages": (
        inside(tensor(stream(4, keys=pickle.dumps(["1"], 2)))),
        "its storages are not those that it names",
    ),
    "tensor with hooks": (
        inside(tensor(stream(4), hooks=b"}K\x01" + call("os", "getcwd") + b"s")),
        FOREIGN.format(r"os\.getcwd"),
    ),
    "tensor with inert hooks": (inside(tensor(stream(4), hooks=b"}K\x01Ns")), "has a tensor with hooks or a special form"),
    "tensor that is conjugated": (
        inside(tensor(stream(4), hooks=b"}}" + text("conj") + b"\x88s")),
        "has a tensor with hooks or a special",
    ),
    "bytes after the pickle": (whole(b"N") + b"junk", "has 4 bytes after its end"),
    "zip of TorchScript": (zipped(whole(b"}"), entries={"archive/constants.pkl": b""}), "is a TorchScript program"),
    "zip in big endian": (zipped(whole(b"}"), entries={"archive/byteorder": b"big"}), "was written in an unknown byte order"),
    "zip bomb": (
        zipped(whole(b"}"), compress=zipfile.ZIP_DEFLATED, entries={"archive/data/0": b"\0" * 50_000_000}),
        "has a compressed",
    ),
    "zip with a huge directory": (huge_directory, "has a zip directory that is too large"),
    "zip that leaves its folder": (
        zipped(whole(b"}"), entries={"archive/../../x": b""}),
        "has an entry 'archive/../../x' that leaves",
    ),
    "zip with an absolute path": (zipped(whole(b"}"), entries={"/etc/x": b""}), "has an entry '/etc/x' that leaves"),
    "zip with backslashes": (zipped(whole(b"}"), entries={"archive\\x": b""}), r"that leaves its folder"),
    "zip with a second folder": (zipped(whole(b"}"), entries={"other/x": b""}), "has an entry 'other/x' outside 'archive/'"),
    "zip with two pickles": (zipped(whole(b"}"), entries={"other/data.pkl": b""}), r"no data\.pkl, or several"),
    "zip with an entry twice": (twice, "has two entries 'archive/data/0'"),
    "zip whose directory lies": (shared_header, "entry 'archive/data/1' is not where its directory says"),
    "not a zip": (b"PK\x03\x04" + b"\0" * 100, "is not a whole zip"),
    "numpy objects": (inside(array(numpy_dtype("O8"), b"K\x01\x85", b"](" + call("os", "system") + b"e")), "type 'O8'"),
    "numpy object scalar": (inside(scalar(numpy_dtype("O8"), b"C\x08" + b"A" * 8)), "has an array of NumPy's type 'O8'"),
    "numpy list for bytes": (
        inside(array(numpy_dtype("f4"), b"K\x01\x85", b"](N" + b"e")),
        r"calls ndarray\.__setstate__ with",
    ),
    "numpy void": (inside(scalar(numpy_dtype("V1000000000"), b"C\x00")), "has an array of NumPy's type 'V1000000000'"),
    "numpy fields": (
        inside(numpy_dtype("f4", b"(K\x03" + text("<") + b"N" + text("a") + b"\x85}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")),
        "has a structured NumPy type",
    ),
    "numpy shape": (
        inside(array(numpy_dtype("f4"), number(1 << 60) + b"\x85", b"C\x04" + b"\0" * 4)),
        "array with a broken shape",
    ),
    "numpy product of shapes": (
        inside(array(numpy_dtype("u1"), b"(" + b"K\xff" * 40 + b"t", b"C\xff" + b"\0" * 255)),
        "array with a broken shape",
    ),
    "numpy scalar of the wrong size": (inside(scalar(numpy_dtype("f8"), b"C\x04" + b"\0" * 4)), "scalar of the wrong size"),
    "numpy subclass": (
        inside(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "dtype"), b"K\x00\x85C\x01b\x87R"),
        r"has an array of class 'numpy\.dtype'",
    ),
    "safetensors header of 2^60": (struct.pack("<Q", 1 << 60) + b"{" + b" " * 50, "is not a checkpoint"),
    "safetensors header of 6 MB": (safetensors(b"{" + b" " * 6_000_000), "has a header of 6,000,001 bytes"),
    "safetensors deep": (safetensors(b'{"a":' + b"[" * 200_000), "has a header that is not JSON"),
    "safetensors outside": (
        safetensors({"w": {"dtype": "F32", "shape": [4], "data_offsets": [1 << 70, (1 << 70) + 16]}}),
        "is not a whole safetensors file|points outside",
    ),
    "safetensors overlap": (
        safetensors({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}),
        "is not a whole safetensors file",
    ),
    "safetensors shape": (
        safetensors({"w": {"dtype": "F32", "shape": [1 << 40, 0, 1 << 40], "data_offsets": [0, 0]}}, b""),
        "is not a whole safetensors file|empty tensor of absurd size",
    ),
    "safetensors of 8 bit floats": (
        safetensors({"w": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}),
        "type 'F8_E4M3'",
    ),
}
STRIDES: dict[str, tuple[bytes, bytes, bytes]] = {
    "petabyte of stride 0": (b"K\x00", number(1 << 50) + b"\x85", b"K\x00\x85"),
    "more elements than the storage": (b"K\x00", b"K\x05\x85", b"K\x01\x85"),
    "overlap": (b"K\x00", b"K\x03K\x02\x86", b"K\x01K\x01\x86"),
    "stride beyond the end": (b"K\x00", b"K\x02\x85", b"K\x04\x85"),
    "offset beyond the end": (b"K\x04", b"K\x01\x85", b"K\x01\x85"),
    "negative offset": (number(-1), b"K\x01\x85", b"K\x01\x85"),
    "negative stride": (b"K\x03", b"K\x04\x85", number(-1) + b"\x85"),
    "negative size": (b"K\x00", number(-4) + b"\x85", b"K\x01\x85"),
    "overflow": (b"K\x00", (number(1 << 32) * 2) + b"\x86", b"K\x00K\x00\x86"),
    "huge stride": (b"K\x00", b"K\x02\x85", number(1 << 61) + b"\x85"),
    "large but empty": (b"K\x00", b"K\x00" + number(1 << 61) + b"\x86", b"K\x01K\x01\x86"),
    "strides missing": (b"K\x00", b"K\x02K\x02\x86", b"K\x01\x85"),
    "100 dimensions": (b"K\x00", b"(" + b"K\x01" * 100 + b"t", b"(" + b"K\x01" * 100 + b"t"),
    "size that is text": (b"K\x00", text("4") + b"\x85", b"K\x01\x85"),
}
for _name, _view in STRIDES.items():
    _problem = "broken (strides|shape)|reaches beyond its storage|absurd size"
    ATTACKS[f"view in a pickle: {_name}"] = (whole(b"}", text("ema"), network(tensor(stream(4), *_view)), b"s"), _problem)
    ATTACKS[f"view in a zip: {_name}"] = (zipped(weights(tensor(stored(), *_view))), _problem)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def read(worker: Worker, path: Path, made: Made) -> Outcome:
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        made(path)
    return worker.read(path)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_and_runs_nothing(worker: Worker, tmp_path: Path, name: str) -> None:
    made, problem = ATTACKS[name]
    outcome = read(worker, tmp_path / "attack", made)
    assert outcome.error == "FileFormatError", outcome
    assert re.search(problem, outcome.message), outcome.message
    assert outcome.message.isascii()
    assert len(outcome.message) < 1000
    assert not outcome.events
    assert outcome.peak_mb < 200
    assert sorted(os.listdir(tmp_path)) == ["attack"]


def test_the_same_files_are_fine_without_the_attack(worker: Worker, tmp_path: Path) -> None:
    """What the attacks are built from is read, so that each is refused for its own sake."""
    fine: list[Made] = [inside(b"}"), zipped(weights(tensor(stored()))), whole(b"}", text("ema"), network(), b"s")]
    for index, made in enumerate(fine):
        outcome = read(worker, tmp_path / str(index), made)
        assert outcome.error == "", outcome
        assert not outcome.events


def test_module_src_is_not_executed(worker: Worker, tmp_path: Path) -> None:
    """Every file of the peers carries source code that their loader executes; here it would raise."""
    path = write_edm_pickle(tmp_path / "net.pkl", tiny_peer())
    assert b"raise RuntimeError" in path.read_bytes()
    outcome = worker.read(path)
    assert (outcome.format, outcome.events) == ("edm pickle", [])


def test_the_alarm_rings(tmp_path: Path) -> None:
    """The ordinary unpickler, in the same process with the same hook, is caught at it."""
    worker = Worker(unsafe=True)
    try:
        outcome = read(worker, tmp_path / "attack", inside(call("os", "getenv", "HOME"), call("os", "system", "true")))
        assert any(event.startswith("os.system") for event in outcome.events)
        outcome = read(worker, tmp_path / "exec", whole(call("builtins", "exec", "import this_is_nowhere")))
        assert {event.split()[0] for event in outcome.events} >= {"pickle.find_class", "exec", "compile", "import"}
    finally:
        worker.close()
