"""A generator on disk: a folder that is also a valid Hugging Face model repository."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from uni_instruct.errors import BundleError, RequestError
from uni_instruct.files import atomic_folder, sha256
from uni_instruct.hub import fetch, is_on_hub, names_file
from uni_instruct.noise import ImageShape

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD, SAMPLES = "config.json", "model.safetensors", "README.md", "samples.png"
# What is served where nothing is named: the first of these that ships.
PREFERRED_GENERATORS = ("fashion-mnist", "digits")
# How a file stores matrices and filters -> safetensors' name and NumPy's.
PRECISIONS = {"fp32": ("F32", "<f4"), "fp16": ("F16", "<f2")}

# What config.json may hold: the type of each field, and of the entries of a list.
_FIELD_TYPES: dict[str, tuple[Any, Any]] = {
    "name": (str, ()),
    "image_shape": (tuple, int),
    "num_classes": (int, ()),
    "class_names": (tuple, str),
    "sigma_init": ((int, float), ()),
    "steps": (int, ()),
    "network": (str, ()),
    "network_args": (dict, ()),
    "provenance": (dict, ()),
    "licence": (str, ()),
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is needed to run a generator and to say where it comes from.

    image_shape is [C, H, W]. num_classes is 0 for an unconditional generator. sigma_init is the noise level that noise are
    scaled to. steps is 1 for a one-step generator; a teacher has more and is sampled with EDM's Heun sampler.
    """

    name: str
    image_shape: ImageShape
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    sigma_init: float = 2.5
    steps: int = 1
    network: str = "ddpmpp"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "unknown"

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise BundleError(f"image shape {self.image_shape} is not [C, H, W]", remedy="give three positive sizes")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise BundleError(
                f"{len(self.class_names)} names for {self.num_classes} classes",
                remedy="name every class or none",
            )
        if not 0 < self.sigma_init < 1e6 or self.steps < 1 or self.num_classes < 0:
            raise BundleError(
                f"sigma_init {self.sigma_init}, steps {self.steps} or num_classes {self.num_classes} is out of range",
                remedy="sigma_init in (0, 1e6), steps >= 1, num_classes >= 0",
            )

    def class_id(self, label: int | str) -> int:
        """The id of a class given by name, by id, or by an id in digits. Raises RequestError for any other."""
        if label in self.class_names:
            return self.class_names.index(str(label))
        readable = isinstance(label, int) or (label.isdecimal() and len(label) < 10)
        number = int(label) if readable else -1
        if isinstance(label, bool) or not 0 <= number < self.num_classes:
            raise RequestError(
                f"class {str(label)[:40]} is outside 0..{self.num_classes - 1}",
                remedy="'uni-instruct inspect' lists the classes",
                param="classes",
            )
        return number

    def class_name(self, class_id: int) -> str:
        """The name of a class, or its id in digits where classes have no names."""
        return self.class_names[class_id] if self.class_names else str(class_id)


class Bundle:
    """A generator's folder, checked when opened: format version, spec, and the hash of the weights.

    origin is its path, or its address on the hub with the commit that it was taken from.
    """

    def __init__(self, path: Path, spec: ModelSpec, weights_sha256: str, origin: str = ""):
        self.path = path
        self.spec = spec
        self.weights_sha256 = weights_sha256
        self.origin = origin or str(path)

    @classmethod
    def open(cls, source: str | Path) -> "Bundle":
        """A folder, the name of a generator that ships with this package, or an address on the hub: hf://owner/name[@revision].

        Raises RequestError where there is none, BundleError where it is incomplete, altered, or of a newer version.
        """
        path, origin = find_bundle(source)
        config = _read_config(path / CONFIG)
        spec = _read_spec(path / CONFIG, config)
        weights = path / WEIGHTS
        if not weights.is_file():
            raise BundleError(f"{path} has no {WEIGHTS}", remedy="copy the whole folder again")
        if sha256(weights) != config["weights_sha256"]:
            raise BundleError(f"{weights} does not match the sha256 in {CONFIG}", remedy="copy the whole folder again")
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
    ) -> "Bundle":
        """Writes the bundle whole or not at all; one that stood there is replaced, its engines with it.

        samples: a PNG. precision: one of PRECISIONS, of the stored file alone: whoever reads it computes in float32. Raises
        DiskError where the disk is full or read-only.
        """
        path = Path(path)
        with atomic_folder(path) as partial:
            write_safetensors(partial / WEIGHTS, weights, precision)
            digest = sha256(partial / WEIGHTS)
            config = {"format_version": FORMAT_VERSION, **asdict(spec), "weights_sha256": digest}
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            (partial / CARD).write_text(card)
            if samples is not None:
                (partial / SAMPLES).write_bytes(samples)
        return cls(path, spec, digest)

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters by name, as in EDM: float32, whatever the file stores."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            weights = load_file(self.path / WEIGHTS)
            for name, array in weights.items():
                if array.dtype.isbuiltin != 1:  # bfloat16 and the like, where something has taught NumPy about them
                    raise TypeError(f"{name} is {array.dtype}")
            return {name: array.astype(np.float32, copy=False) for name, array in weights.items()}
        except (SafetensorError, TypeError, AttributeError) as error:  # the last two: types that NumPy does not have
            raise BundleError(f"{self.path / WEIGHTS} cannot be read: {error}", remedy="copy the whole folder again") from error

    def stored_precision(self) -> str:
        """fp16 where the file holds matrices in half precision, else fp32. Raises BundleError as `weights` does."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / WEIGHTS, framework="numpy") as file:
                types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{self.path / WEIGHTS} cannot be read: {error}", remedy="copy the whole folder again") from error
        return "fp16" if PRECISIONS["fp16"][0] in types else "fp32"

    def engine_folder(self, kind: str) -> Path:
        """Where the exported engine of that kind stands, or would stand."""
        return self.path / "engines" / kind


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], precision: str = "fp32") -> None:
    """Arrays as safetensors, one after the other: safetensors' own `save` holds a second copy of them all."""
    # Biases and scales keep 32 bits: they are 1 % of the bytes, and on digits half of what rounding changes. They come first,
    # so that every array begins at a multiple of its own item size.
    stored = {name: PRECISIONS[precision if array.ndim > 1 else "fp32"] for name, array in weights.items()}
    ordered = sorted(weights, key=lambda name: stored[name] == PRECISIONS["fp16"])
    header, end = {}, 0
    for name in ordered:
        start, end = end, end + weights[name].size * np.dtype(stored[name][1]).itemsize
        header[name] = {"dtype": stored[name][0], "shape": list(weights[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(np.ascontiguousarray(weights[name], dtype=stored[name][1]).data)


def shipped_generators() -> list[str]:
    """Names of the generators that ship with this package."""
    folder = Path(str(files("uni_instruct") / "generators"))
    return sorted(path.name for path in folder.iterdir() if (path / CONFIG).is_file()) if folder.is_dir() else []


def default_generator() -> str:
    """The generator that is served where none is named."""
    shipped = shipped_generators()
    return next((name for name in PREFERRED_GENERATORS if name in shipped), PREFERRED_GENERATORS[-1])


def is_bundle(source: str | Path) -> bool:
    """Whether the source is meant for a bundle: a folder of one, a shipped generator, or a repository on the hub."""
    on_hub = is_on_hub(source) and not names_file(source)
    return on_hub or (Path(source) / CONFIG).is_file() or str(source) in shipped_generators()


def find_bundle(source: str | Path) -> tuple[Path, str]:
    """The folder of a bundle and its origin. Raises RequestError where there is none."""
    if is_on_hub(source):
        download = fetch(str(source))
        return download.path, download.origin
    path = Path(source)
    if (path / CONFIG).is_file():
        return path, str(path)
    if str(source) in shipped_generators():
        return Path(str(files("uni_instruct") / "generators" / str(source))), str(source)
    shipped = ", ".join(shipped_generators()) or "none"
    problem = f"{source} is not a bundle (it has no {CONFIG})" if path.exists() else f"there is no bundle {source}"
    remedy = f"give a folder that 'train' wrote, hf://owner/name, or a shipped generator: {shipped}"
    raise RequestError(problem, remedy=remedy, param="bundle")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not JSON: {error}", remedy="copy the whole folder again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or "weights_sha256" not in config:
        raise BundleError(f"{path} is not the configuration of a bundle", remedy="give a folder that 'train' wrote")
    if version > FORMAT_VERSION:
        raise BundleError(f"{path} has format version {version}, this is {FORMAT_VERSION}", remedy="update uni-instruct")
    return config


def _read_spec(path: Path, config: dict[str, Any]) -> ModelSpec:
    names = {f.name for f in fields(ModelSpec)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in names
    }
    try:
        for name, value in values.items():
            _check_type(name, value)
        return ModelSpec(**values)
    except TypeError as error:
        raise BundleError(f"{path} does not describe a generator: {error}", remedy="copy the whole folder again") from error


def _check_type(name: str, value: Any) -> None:
    kind, entries = _FIELD_TYPES[name]
    parts = value if entries and isinstance(value, tuple) else ()
    if not isinstance(value, kind) or not all(isinstance(part, entries) for part in parts):
        raise TypeError(f"{name} is {str(value)[:40]!r}")
    if any(isinstance(part, bool) for part in (value, *parts)):
        raise TypeError(f"{name} is {value}")
