"""ModelSpec: what noise goes into a model, what picture comes out, and where the model is from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from uni_instruct.errors import BundleError, RequestError

# [C, H, W] of one image, or of the noise that it is made of.
ImageShape = tuple[int, int, int]

# The noise level that SiD starts one-step generators from (arXiv 2404.04057); EDM's number of steps for images of 32x32.
DEFAULT_SIGMA_INIT, TEACHER_STEPS = 2.5, 18

# What config.json may hold: the type of each field, and of the entries of a list.
_FIELD_TYPES: dict[str, tuple[Any, Any]] = {
    "name": (str, ()),
    "noise_shape": (tuple, int),
    "latents": (bool, ()),
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
    """What is needed to run a model and to say where it comes from.

    noise_shape is [C, H, W] of the noise, and of what the network makes of it. latents: that is a VAE's latents, no picture.
    num_classes is 0 for an unconditional model. sigma_init is the noise level that a one-step generator's noise is scaled to.
    steps is 1 for a one-step generator; a teacher has more and is sampled with EDM's Heun sampler.
    """

    name: str
    noise_shape: ImageShape
    latents: bool = False
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    sigma_init: float = DEFAULT_SIGMA_INIT
    steps: int = 1
    network: str = "ddpmpp"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "unknown"

    def __post_init__(self) -> None:
        if len(self.noise_shape) != 3 or min(self.noise_shape) < 1:
            raise BundleError(f"shape {self.noise_shape} is not [C, H, W]", remedy="give three positive sizes")
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

    @property
    def image_shape(self) -> ImageShape:
        """[C, H, W] of what is handed out: a picture, or latents where `latents` says so."""
        return self.noise_shape

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

    def to_config(self) -> dict[str, Any]:
        """The fields as config.json holds them; image_shape is said as well, for those who read the file."""
        values = asdict(self)
        return {"name": values.pop("name"), "image_shape": list(self.image_shape), **values}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """The spec that a config.json of any format version describes. Raises TypeError or BundleError for what is no spec."""
        config = _as_format_2(config) if config.get("format_version") == 1 else config
        names = {f.name for f in fields(cls)}
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in names
        }
        for name, value in values.items():
            _check_type(name, value)
        return cls(**values)


def _as_format_2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 had one shape for noise and image, and did not say what makes latents: four channels did."""
    if "image_shape" not in config:
        raise TypeError("image_shape is missing")
    shape = config["image_shape"]
    latents = isinstance(shape, list) and len(shape) == 3 and shape[0] not in (1, 3)
    return {**config, "noise_shape": shape, "latents": latents}


def _check_type(name: str, value: Any) -> None:
    type_, entries = _FIELD_TYPES[name]
    parts = value if entries and isinstance(value, tuple) else ()
    if not isinstance(value, type_) or not all(isinstance(part, entries) for part in parts):
        raise TypeError(f"{name} is {str(value)[:40]!r}")
    if type_ is not bool and any(isinstance(part, bool) for part in (value, *parts)):
        raise TypeError(f"{name} is {value}")
