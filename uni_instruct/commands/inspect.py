"""`uni-instruct inspect`: show what is in a bundle, a data set or a checkpoint."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TypedDict, cast

import numpy as np
import rich_click as click

from uni_instruct.bundle import Bundle, is_bundle, is_run, shipped_generators
from uni_instruct.commands.inspect_checkpoint import Row, checkpoint_facts, checkpoint_rows, is_checkpoint
from uni_instruct.data import DATASETS, is_data, open_dataset
from uni_instruct.engine import EngineStatusFacts, engine_status
from uni_instruct.engines.record import ParityReport, StoredEngine
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.hub import fetch, names_file
from uni_instruct.system.printable import printable

CLASSES_SHOWN = 20


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.option("--data", "as_data", is_flag=True, help="Read SOURCE as a data set if a generator has the same name.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(source: str, as_data: bool, as_json: bool) -> None:
    """Show what is in SOURCE.

    SOURCE is a bundle (a folder, a shipped generator, hf://owner/name), a data set (a folder, zip, npz or name), or another
    project's checkpoint (a pickle, torch's file, safetensors, hf://owner/name/file). No code in a checkpoint is run.

    Example: uni-instruct inspect runs/digits/generator
    """
    facts, rows = _facts_and_rows(source, as_data)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(rows)


def _facts_and_rows(source: str, as_data: bool) -> tuple[Mapping[str, object], list[Row]]:
    """The facts about SOURCE, for JSON and in words."""
    path = fetch(source).path if names_file(source) else Path(source)
    if is_checkpoint(path):
        checkpoint = checkpoint_facts(path)
        return checkpoint, checkpoint_rows(checkpoint)
    if (is_bundle(source) or is_run(source)) and not as_data:
        bundle = bundle_facts(Bundle.open(source))
        return bundle, bundle_rows(bundle)
    if is_data(source):
        data = data_facts(source)
        return data, data_rows(data)
    raise RequestError(
        f"there is no bundle, data set or checkpoint {source}",
        remedy=f"give a path, a data set ({', '.join(DATASETS)}) or a shipped generator "
        f"({', '.join(shipped_generators()) or 'none'})",
        param="source",
    )


class EngineFacts(TypedDict, total=False):
    """An engine's record, its size and its status on this machine; for an engine that cannot be used, its id and the error."""

    engine_id: str
    error: str
    file: str
    file_bytes: int
    way: str
    parity: ParityReport
    versions: Mapping[str, str]
    here: EngineStatusFacts


class BundleFacts(TypedDict):
    """A bundle: its spec as in config.json, and the contents of its files."""

    kind: str
    path: str
    name: str
    noise_shape: tuple[int, int, int]
    image_shape: list[int]
    decoder: Mapping[str, object] | None
    num_classes: int
    class_names: tuple[str, ...]
    steps: int
    sigma_init: float
    network: str
    network_args: Mapping[str, object]
    provenance: Mapping[str, object]
    licence: str
    makes_pictures: bool
    parameters: int
    tensors: int
    weights_precision: str
    weights_bytes: int
    weights_sha256: str
    engines: list[EngineFacts]


class DataFacts(TypedDict):
    """A data set; class_counts is empty without classes."""

    kind: str
    name: str
    images: int
    image_shape: list[int]
    latents: bool
    num_classes: int
    class_names: list[str]
    class_counts: list[int]
    note: str
    licence: str
    source: str


def bundle_facts(bundle: Bundle) -> BundleFacts:
    """Spec, sizes and engines of a bundle, for JSON. An engine that cannot be used has an `error`."""
    weights = bundle.weights()
    facts = {
        "kind": "generator" if bundle.spec.steps == 1 else "teacher",
        "path": bundle.origin,
        **bundle.spec.to_config(),
        "makes_pictures": bundle.spec.makes_pictures,
        # Resampling filters are stored with the weights, but are constants and so no parameters.
        "parameters": sum(array.size for name, array in weights.items() if not name.endswith("resample_filter")),
        "tensors": len(weights),
        "weights_precision": bundle.stored_precision(),
        "weights_bytes": bundle.weights_bytes(),
        "weights_sha256": bundle.weights_sha256,
        "engines": [_engine_facts(bundle, stored) for stored in bundle.engines().values()],
    }
    return cast(BundleFacts, facts)


def data_facts(source: str) -> DataFacts:
    """Count, shape and classes of a data set, for JSON."""
    dataset = open_dataset(source)
    counts = [] if dataset.labels is None else np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
    return {
        "kind": "data",
        "name": dataset.name,
        "images": len(dataset),
        "image_shape": list(dataset.image_shape),
        "latents": dataset.latents,
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "class_counts": counts,
        "note": dataset.note,
        "licence": dataset.licence,
        "source": dataset.source,
    }


def bundle_rows(facts: BundleFacts) -> list[Row]:
    """A bundle's facts in words."""
    provenance = [(f"provenance: {key}", _text(value)) for key, value in facts["provenance"].items()]
    engines = [(f"engine {engine['engine_id']}", _engine_text(engine)) for engine in facts["engines"]]
    hint = [("engines", f"none exported; uni-instruct export {quote(facts['path'])} --to onnx")] if facts["steps"] == 1 else []
    if not facts["makes_pictures"]:
        attach = f"uni-instruct import {quote(facts['path'])} --decoder VAE --out BUNDLE"
        hint = [("decoder", f"none, so the output is latents; to add one: {attach}")]
    return [
        (facts["kind"], facts["name"]),
        ("images" if facts["makes_pictures"] else "latents", _shape_text(facts["image_shape"])),
        *([("decoder", _decoder_text(facts["decoder"], facts["noise_shape"]))] if facts["decoder"] else []),
        ("classes", _classes_text(facts["class_names"], facts["num_classes"])),
        ("steps", f"{facts['steps']}, from noise of sigma {facts['sigma_init']:g}"),
        ("network", f"{facts['network']} {_text(facts['network_args'])}"),
        ("parameters", f"{facts['parameters']:,} in {facts['tensors']} tensors"),
        (
            "weights",
            f"{facts['weights_bytes'] / 1e6:.1f} MB of {facts['weights_precision']}, sha256 {facts['weights_sha256']}",
        ),
        ("licence", facts["licence"]),
        *provenance,
        *(engines or hint),
    ]


def data_rows(facts: DataFacts) -> list[Row]:
    """A data set's facts in words."""
    counts = list(zip(facts["class_names"], facts["class_counts"], strict=True))
    # ImageNet has a thousand classes; --json lists them all.
    shown = [(f"class {name}", f"{count:,} images") for name, count in counts[:CLASSES_SHOWN]]
    more = len(counts) - len(shown)
    return [
        ("data set", facts["name"]),
        ("latents" if facts["latents"] else "images", f"{facts['images']:,} of {_shape_text(facts['image_shape'])}"),
        ("classes", str(facts["num_classes"] or "none")),
        *([("note", facts["note"])] if facts["note"] else []),
        ("licence", facts["licence"]),
        ("source", facts["source"]),
        *shown,
        *([("...", f"{more} more classes; --json lists them")] if more else []),
    ]


def _engine_facts(bundle: Bundle, stored: StoredEngine) -> EngineFacts:
    try:
        size = stored.file().stat().st_size
        bundle.reference()  # if it is damaged, the first use of every engine fails
    except BundleError as error:
        return {"engine_id": str(stored.engine_id), "error": str(error)}
    here = engine_status(bundle, stored.engine_id).facts()
    return cast(EngineFacts, {**asdict(stored.record()), "file_bytes": size, "here": here})


# Parity is shown beside each engine, so that users can see how closely it agrees with torch.
def _engine_text(engine: EngineFacts) -> str:
    if "error" in engine:
        return f"cannot be used: {engine['error']}"
    file = ", ".join(filter(None, (engine["file"], f"{engine['file_bytes'] / 1e6:.1f} MB", engine["way"])))
    return f"{file}; {_parity_text(engine['parity'])}; by {_text(engine['versions'])}; {_here_text(engine['here'])}"


def _parity_text(parity: ParityReport) -> str:
    if not parity:
        return "built but not yet checked, because this machine lacks its GPU; the machine that runs it checks it first"
    invariant = "yes" if parity["batch_invariant"] else "no"
    return (
        f"against torch relative L2 {parity['relative_l2']:.1e}, equal pixels {parity['equal_pixels']:.3%}; "
        f"batch invariant: {invariant}"
    )


def _here_text(here: EngineStatusFacts) -> str:
    speed = f", {here['images_per_s']:.3g} images/s" if here["images_per_s"] else ""
    reason = f": {here['reason']}" if here["reason"] else ""
    texts = {
        "trusted": f"trusted on this machine{speed}",
        "refused": "refused on this machine",
        "untried": "not yet tried on this machine; its first use tries it",
        "absent": "cannot run here",
        "unknown": "of a runtime that this version does not know",
    }
    return texts[here["state"]] + reason


def _shape_text(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{height}x{width} (height x width), {channels} channel{'s' if channels > 1 else ''}"


def _decoder_text(decoder: Mapping[str, object], noise_shape: tuple[int, int, int]) -> str:
    channels, height, width = noise_shape
    return f"{decoder['architecture']} of {decoder['source']}, on latents {channels}x{height}x{width}"


def _classes_text(names: Sequence[str], count: int) -> str:
    if not count:
        return "none (unconditional)"
    shown = ", ".join(list(names)[:CLASSES_SHOWN]) + (", ..." if len(names) > CLASSES_SHOWN else "")
    return f"{count}: {shown}" if names else f"{count}, without names"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _show(rows: list[Row]) -> None:
    """Print the rows: as a table on a terminal, otherwise as lines."""
    if not sys.stdout.isatty():
        print("\n".join(f"{name}: {printable(text)}" for name, text in rows))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(f"[bold]{escape(name)}", escape(printable(text)))
    Console().print(table)
