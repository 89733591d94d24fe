"""Export from Python, as a notebook calls it."""

from pathlib import Path

from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import EngineRecord
from uni_instruct.errors import RequestError
from uni_instruct.export.targets import TARGETS, export_engine


def export_bundle(bundle: Bundle | str | Path, to: str = "onnx-fp32") -> EngineRecord:
    """Builds an engine of the bundle, checks it against torch, puts it into the bundle, and returns its record.

    to: the engine's id, or a runtime that has but one. The record's `parity` is how well the engine agrees with torch. Raises
    RequestError for an unknown target or a many-step teacher, ParityError where the engine does not agree.
    """
    fitting = [name for name, target in TARGETS.items() if to in (name, target.engine_id.runtime)]
    if len(fitting) != 1:
        raise RequestError(f"target '{to}' is unknown", remedy=f"choose one of {', '.join(TARGETS)}", param="to")
    return export_engine(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), fitting[0])
