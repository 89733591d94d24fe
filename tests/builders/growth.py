"""What is alive in this process, by type: what stays behind after many requests is counted, not timed."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Objects that only the garbage collector would find stay alive in the block, and are counted with the others."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def alive() -> Counter[str]:
    """How many objects there are of each type that may hold others."""
    return Counter(f"{type(found).__module__}.{type(found).__qualname__}" for found in gc.get_objects())


def grown(before: Counter[str], least: int) -> dict[str, int]:
    """The types of which there are by `least` more than before."""
    return {name: count - before[name] for name, count in alive().items() if count - before[name] >= least}
