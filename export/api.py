"""Export from Python, for example in a notebook."""

from pathlib import Path

from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import EngineRecord
from uni_instruct.errors import RequestError
from uni_instruct.export.targets import ALL, TO, choose_targets, export_engine


def export_bundle(bundle: Bundle | str | Path, to: str = "onnx-fp32", device: str | None = None) -> EngineRecord:
    """Build an engine of the bundle, check it against torch, store it in the bundle, and return its record.

    to: the engine's id, or a runtime for which only one engine would be built here. device: where it is checked, as in
    `open_engine`. The record's `parity` says how well the engine agrees with torch. Raises RequestError for an unknown target
    or a many-step teacher, ParityError if the engine does not agree, and what else `export_engine` raises.
    """
    fitting = [str(target.engine_id) for target in choose_targets([to])] if to in TO else [to]
    if len(fitting) != 1 or to == ALL:
        raise RequestError(f"target '{to}' names several engines", remedy=f"choose one of {', '.join(fitting)}", param="to")
    return export_engine(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), fitting[0], device)
