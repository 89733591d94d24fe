"""torch's stream of pickles and raw storages: its files before version 1.6, and each tensor inside an ordinary pickle."""

from collections.abc import Callable

from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, MalformedFile, shown
from uni_instruct.checkpoints.pickle.interpreter import PickleInterpreter
from uni_instruct.checkpoints.pickle.stand_in import AllowedGlobals, StandIn
from uni_instruct.checkpoints.source import Source
from uni_instruct.checkpoints.tensors import Element, Storage

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_NOTHING = AllowedGlobals({}, {})
_MAX_KEY_LENGTH = 100


def read_stream(source: Source, budget: Budget, allowed: AllowedGlobals, *, magic_read: bool = False) -> object:
    """The value of the stream, with the place of each of its storages. Raises MalformedFile.

    The stream holds a magic number, the protocol, facts about the machine, the value, the storages' keys, and for each storage
    its number of elements and their bytes. magic_read: the magic number was read already.
    """
    if not magic_read and _plain(source, budget) != MAGIC:
        raise MalformedFile("has a storage that is not a torch stream", UNSUPPORTED)
    protocol, system = _plain(source, budget), _plain(source, budget)
    if protocol != _PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise MalformedFile("is a torch stream of an unknown version or byte order", UNSUPPORTED)
    storages: dict[str, Storage] = {}
    value = PickleInterpreter(source, budget, allowed, persistent_storages(budget, storages)).run()
    keys = _plain(source, budget)
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise MalformedFile("is not a whole torch stream: its storages are not those that it names")
    # The bytes come after the value, in the order of the keys, so the place of each storage is known only now.
    for key in keys:
        _locate(source, storages[key])
    if source.position != source.end:
        raise MalformedFile(f"has {source.end - source.position:,} bytes after its end")
    return value


def persistent_storages(
    budget: Budget, storages: dict[str, Storage], make: Callable[[Element, str, object], Storage] | None = None
) -> Callable[[object], object]:
    """A function from torch's persistent ids to their objects: a storage, made once for each key, or a class.

    An id is ('storage', type, key, device, number of elements), in streams with a view after it, or ('module', class, ...).
    """

    def persistent(identity: object) -> object:
        if type(identity) is not tuple or not identity:
            raise MalformedFile("has a persistent id that is not torch's", UNSUPPORTED)
        if identity[0] == "module" and len(identity) == 4 and isinstance(identity[1], StandIn):
            return identity[1]
        if identity[0] != "storage" or len(identity) not in (5, 6) or not isinstance(identity[1], Element):
            raise MalformedFile("has a persistent id that is not torch's", UNSUPPORTED)
        element, key, numel = identity[1], identity[2], identity[4]
        if type(key) is not str or len(key) > _MAX_KEY_LENGTH or (len(identity) == 6 and identity[5] is not None):
            raise MalformedFile(f"has a storage with the key {shown(key)} or a view of one", UNSUPPORTED)
        if key not in storages:
            storages[key] = make(element, key, numel) if make else Storage(budget, element, numel)
        # Tensors share storages by key. An id that describes a known storage differently could reach beyond its bytes.
        if storages[key].element is not element or storages[key].numel != numel:
            raise MalformedFile(f"describes storage {shown(key)} in two ways", UNSUPPORTED)
        return storages[key]

    return persistent


def _plain(source: Source, budget: Budget) -> object:
    """The next pickle of the stream. It may not name any global."""
    return PickleInterpreter(source, budget, _NOTHING).run()


def _locate(source: Source, storage: Storage) -> None:
    numel = source.unsigned(8)
    if numel != storage.numel:
        raise MalformedFile(f"has {numel:,} elements in a storage of {storage.numel:,}")
    storage.span = source.span(numel * storage.element.stored.itemsize)
