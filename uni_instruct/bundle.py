"""A generator on disk: one folder, which is also a valid Hugging Face model repository."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import TypedDict

import numpy as np

from uni_instruct.engines.record import RECORD, EngineId, StoredEngine, id_of_folder
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.hub import fetch, is_on_hub, names_file
from uni_instruct.reference import REFERENCE, Reference
from uni_instruct.spec import ModelSpec
from uni_instruct.system.file_type import import_of_weights
from uni_instruct.system.files import JSON_ERRORS, atomic_file, atomic_folder, sha256
from uni_instruct.weights_file import read_weights, stored_precision, write_weights

# Format 2 has noise_shape, latents and decoder in config.json, and reference.npz. Format 1 can still be read.
FORMAT_VERSION = 2
CONFIG, WEIGHTS, CARD, SAMPLES = "config.json", "model.safetensors", "README.md", "samples.png"
DECODER, ENGINES = "decoder.safetensors", "engines"
# The default generator is the first of these that ships with the package.
PREFERRED_GENERATORS = ("fashion-mnist", "digits")
# The VAE of EDM2's latents, in diffusers' format on the hub.
USUAL_VAE = "hf://stabilityai/sd-vae-ft-mse"


class Bundle:
    """A generator's folder. `open` checks its format version, its spec and the hash of its weights.

    origin: the path, or the address on the hub with the commit that was downloaded.
    weights_sha256: identifies the weights that make the images. With a decoder it is the hash of both files' hashes, because
    the decoder's weights make the images too.
    """

    def __init__(self, path: Path, spec: ModelSpec, weights_sha256: str, origin: str = ""):
        self.path = path
        self.spec = spec
        self.weights_sha256 = _identity(weights_sha256, spec)
        self.origin = origin or str(path)

    @classmethod
    def open(cls, source: str | Path) -> "Bundle":
        """Open a folder, a generator or teacher that ships with this package (by name), or an address on the hub.

        An address is hf://owner/name[@revision].

        Raises RequestError if there is no bundle, BundleError if it is incomplete, altered, or of a newer format version.
        """
        path, origin = find_bundle(source)
        config = _read_config(path / CONFIG)
        spec = _read_spec(path / CONFIG, config)
        _check_hash(path / WEIGHTS, config["weights_sha256"])
        if spec.decoder is not None:
            _check_hash(path / DECODER, spec.decoder.weights_sha256)
        return cls(path, spec, config["weights_sha256"], origin)

    @classmethod
    def write(
        cls,
        path: Path,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        card: str,
        samples: bytes | None = None,
        *,
        precision: str = "fp32",
        decoder: Mapping[str, np.ndarray] | None = None,
        reference: "MakeReference | None" = None,
    ) -> "Bundle":
        """Write the bundle atomically. An existing bundle at `path` is replaced with its engines; anything else is not.

        samples: a PNG.
        precision: one of WEIGHT_PRECISIONS. It sets how the network's weights are stored; readers still compute in float32.
        decoder: the decoder's weights. Required if the spec has a decoder, otherwise None.
        reference: makes reference.npz from the stored weights; `networks.reference.make_reference`, which needs torch.

        Raises DiskError if the disk is full or read-only.
        """
        assert (decoder is None) == (spec.decoder is None), "a decoder has weights"
        path = Path(path)
        check_place(path)
        with atomic_folder(path) as partial:
            if decoder is not None and spec.decoder is not None:
                write_weights(partial / DECODER, decoder)
                spec = replace(spec, decoder=replace(spec.decoder, weights_sha256=sha256(partial / DECODER)))
            write_weights(partial / WEIGHTS, weights, precision)
            digest = sha256(partial / WEIGHTS)
            (partial / CONFIG).write_text(_config_text(spec, digest))
            (partial / CARD).write_text(card)
            if samples is not None:
                (partial / SAMPLES).write_bytes(samples)
            if reference is not None and (made := reference(cls(partial, spec, digest))):
                made.write(partial / REFERENCE)
        return cls(path, spec, digest)

    def weights_bytes(self) -> int:
        """The size of the weights file in bytes. Raises BundleError if the file was deleted after the bundle was opened."""
        if not (self.path / WEIGHTS).is_file():
            raise _gone(self.path / WEIGHTS)
        return (self.path / WEIGHTS).stat().st_size

    def weights(self) -> dict[str, np.ndarray]:
        """The network's parameters by EDM's names: float32, even if the file stores float16."""
        return read_weights(self.path / WEIGHTS)

    def decoder_weights(self) -> dict[str, np.ndarray] | None:
        """The decoder's parameters by diffusers' names: float32; None if the bundle has no decoder."""
        return None if self.spec.decoder is None else read_weights(self.path / DECODER)

    def with_steps(self, steps: int) -> "Bundle":
        """The same teacher, sampled with `steps` steps. Raises RequestError for a one-step generator and more than one step."""
        if self.spec.steps == 1 and steps > 1:
            problem = f"{self.path} is a one-step generator and cannot be sampled in {steps} steps"
            raise RequestError(problem, remedy="leave --steps out, or give a teacher", param="steps")
        found = copy.copy(self)
        found.spec = replace(self.spec, steps=steps)
        return found

    def check_makes_pictures(self) -> None:
        """Raise RequestError if the network makes latents and the bundle has no decoder. The remedy adds a decoder."""
        if not self.spec.makes_pictures:
            raise RequestError(
                f"{self.origin} makes a VAE's latents and has no decoder to turn them into pictures",
                remedy=f"add the VAE's decoder: uni-instruct import {quote(self.origin)} --decoder {USUAL_VAE} "
                f"--out {self.spec.name}-pictures",
                param="bundle",
            )

    def stored_precision(self) -> str:
        """'fp16' if the file stores matrices in half precision, else 'fp32'. Raises BundleError for a damaged file."""
        return stored_precision(self.path / WEIGHTS)

    def reference(self) -> Reference | None:
        """Torch's images, to compare engines with; None if the bundle has none: teachers, latents, format 1.

        Raises BundleError for a damaged file.
        """
        path = self.path / REFERENCE
        return Reference.read(path, self.spec, self.weights_sha256) if path.is_file() else None

    def upgrade_format(self, reference: "MakeReference") -> None:
        """Write a missing or damaged reference.npz, and convert a config.json of format 1 to this version's format.

        A current bundle is left as it is. The bundle can be opened at any moment meanwhile. Raises DiskError if a file cannot
        be written.
        """
        if not self._reference_is_current() and (made := reference(self)):
            with atomic_file(self.path / REFERENCE) as partial:
                made.write(partial)
        config = _read_config(self.path / CONFIG)
        if config["format_version"] < FORMAT_VERSION:
            with atomic_file(self.path / CONFIG) as partial:
                partial.write_text(_config_text(self.spec, config["weights_sha256"]))

    def rename(self, name: str, card: str) -> "Bundle":
        """Rename the bundle in place, also in the recipe of its provenance; weights and engines stay. Raises DiskError."""
        recipe = self.spec.provenance.get("recipe")
        named = {"recipe": {**recipe, "name": name}} if isinstance(recipe, dict) else {}
        spec = replace(self.spec, name=name, provenance={**self.spec.provenance, **named})
        for file, text in ((CARD, card), (CONFIG, _config_text(spec, _read_config(self.path / CONFIG)["weights_sha256"]))):
            with atomic_file(self.path / file) as partial:
                partial.write_text(text)
        return Bundle.open(self.path)

    def _reference_is_current(self) -> bool:
        try:
            return self.reference() is not None
        except BundleError:
            return False

    def engines(self) -> dict[EngineId, StoredEngine]:
        """The exported engines in the bundle, by id, including those of format 1. Their files are not read yet."""
        found: dict[EngineId, StoredEngine] = {}
        for record in sorted((self.path / ENGINES).glob(f"[!.]*/{RECORD}")):
            engine_id = id_of_folder(record.parent.name)
            # Format 1 named folders otherwise. If an engine is there under both names, the folder with the id's name is newer.
            if engine_id and (engine_id not in found or record.parent.name == str(engine_id)):
                found[engine_id] = self.engine_in(record.parent, engine_id)
        return found

    def engine_in(self, folder: Path, engine_id: EngineId) -> StoredEngine:
        """The engine in that folder, which is its final place or a temporary one during an export."""
        return StoredEngine(engine_id=engine_id, folder=folder, bundle=self.path, weights_sha256=self.weights_sha256)

    def engine_folder(self, engine_id: EngineId) -> Path:
        """The folder that `export` writes the engine to."""
        return self.path / ENGINES / str(engine_id)


# A function that makes a bundle's reference. It is passed in because it needs torch, which the core does not import.
MakeReference = Callable[[Bundle], Reference | None]


def shipped_generators() -> list[str]:
    """Names of the generators that ship with this package."""
    return sorted(_shipped("generators"))


def shipped_teachers() -> list[str]:
    """Names of the teachers that ship with this package, for distillation and comparison."""
    return sorted(_shipped("teachers"))


def _shipped(kind: str) -> dict[str, Path]:
    folder = Path(str(files("uni_instruct") / kind))
    return {path.name: path for path in folder.iterdir() if (path / CONFIG).is_file()} if folder.is_dir() else {}


def default_generator() -> str:
    """The name of the generator that is used by default."""
    shipped = shipped_generators()
    return next((name for name in PREFERRED_GENERATORS if name in shipped), PREFERRED_GENERATORS[-1])


def is_bundle(source: str | Path) -> bool:
    """Whether the source names a bundle: a bundle's folder, one that ships by name, or a repository on the hub."""
    on_hub = is_on_hub(source) and not names_file(source)
    return on_hub or (Path(source) / CONFIG).is_file() or str(source) in (*shipped_generators(), *shipped_teachers())


def is_run(source: str | Path) -> bool:
    """Whether the source is the folder of a training run, which contains its bundles."""
    return (Path(source) / "recipe.yaml").is_file() and not (Path(source) / CONFIG).is_file()


def check_place(path: Path) -> None:
    """Raise RequestError if the folder contains something other than a bundle, such as photographs or a training."""
    if path.is_dir() and not (path / CONFIG).is_file() and any(path.iterdir()):
        raise RequestError(f"{path} holds something that is not a bundle", remedy="name another folder", param="out")


def find_bundle(source: str | Path) -> tuple[Path, str]:
    """The folder of a bundle and its origin. Raises RequestError if there is none."""
    if is_on_hub(source):
        download = fetch(str(source))
        return download.path, download.origin
    path = Path(source)
    if (path / CONFIG).is_file():
        return path, str(path)
    if found := (_shipped("generators") | _shipped("teachers")).get(str(source)):
        return found, str(source)
    if is_run(path):
        raise _of_run(path)
    shipped = f"{', '.join(shipped_generators()) or 'none'} (teachers: {', '.join(shipped_teachers()) or 'none'})"
    problem = f"{source} is not a bundle (it has no {CONFIG})" if path.exists() else f"there is no bundle {source}"
    remedy = f"give a folder that 'train' wrote, hf://owner/name, or a shipped generator: {shipped}"
    if command := import_of_weights(path):
        remedy = f"import the weights there: {command}"
    raise RequestError(problem, remedy=remedy, param="bundle")


def _of_run(folder: Path) -> RequestError:
    bundles = [quote(str(folder / role)) for role in ("generator", "teacher") if (folder / role / CONFIG).is_file()]
    remedy = f"give {' or '.join(bundles)}" if bundles else f"see uni-instruct train {quote(str(folder))} --status"
    return RequestError(f"{folder} is the folder of a training run, not a bundle", remedy=remedy, param="bundle")


def _identity(weights_sha256: str, spec: ModelSpec) -> str:
    if spec.decoder is None:
        return weights_sha256
    return hashlib.sha256(f"{weights_sha256} {spec.decoder.weights_sha256}".encode()).hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise _gone(path)
    if sha256(path) != expected:
        raise BundleError(f"{path} does not match the sha256 in {CONFIG}", remedy="copy or download the whole folder again")


def _gone(path: Path) -> BundleError:
    return BundleError(f"{path.parent} has no {path.name}", remedy="copy or download the whole folder again")


class _Config(TypedDict):
    """The fields of config.json that are not part of the spec."""

    format_version: int
    weights_sha256: str


def _config_text(spec: ModelSpec, weights_sha256: str) -> str:
    config = {"format_version": FORMAT_VERSION, **spec.to_config(), "weights_sha256": weights_sha256}
    return json.dumps(config, indent=2) + "\n"


def _read_config(path: Path) -> _Config:
    try:
        config: _Config = json.loads(path.read_text())
    except JSON_ERRORS as error:
        raise BundleError(f"{path} is not JSON: {error}", remedy="copy or download the whole folder again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or "weights_sha256" not in config:
        command = import_of_weights(path.parent)
        other = f", or import the weights there: {command}" if command else ""
        raise BundleError(f"{path} is not the configuration of a bundle", remedy=f"give a folder that 'train' wrote{other}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}, but this uni-instruct reads versions up to {FORMAT_VERSION}",
            remedy="update uni-instruct",
        )
    return config


def _read_spec(path: Path, config: Mapping[str, object]) -> ModelSpec:
    try:
        return ModelSpec.from_config(config)
    except TypeError as error:
        raise BundleError(
            f"{path} does not describe a generator: {error}", remedy="copy or download the whole folder again"
        ) from error
