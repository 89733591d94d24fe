"""ModelSpec: a model's noise and image shapes, classes, network and provenance. DecoderSpec: the decoder of a VAE."""

import difflib
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from uni_instruct.errors import BundleError, RequestError

# [C, H, W] of one image, or of its noise.
ImageShape = tuple[int, int, int]

# SiD's noise level for one-step generators (arXiv 2404.04057); EDM's number of sampling steps for images of 32x32.
DEFAULT_SIGMA_INIT, TEACHER_STEPS = 2.5, 18

MAX_NAME_LENGTH = 100  # of a model, in characters
# The only supported decoder, by diffusers' name.
AUTOENCODER_KL = "AutoencoderKL"
# Decoding needs up to a kilobyte of memory a pixel. This limit allows two pictures of 512x512 at once.
_PIXELS_AT_ONCE = 2 * 512 * 512
# Upper limits for a decoder's configuration, far above any real one. A larger decoder would not fit into memory.
_WIDEST, _MAX_LEVELS, _MAX_LAYERS = 8192, 10, 32

# The fields of config.json: the type of each, and the type of the entries if it is a list.
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
_DECODER_TYPES: dict[str, tuple[Any, Any]] = {
    "architecture": (str, ()),
    "block_out_channels": (tuple, int),
    "layers_per_block": (int, ()),
    "norm_num_groups": (int, ()),
    "out_channels": (int, ()),
    "mid_block_add_attention": (bool, ()),
    "use_post_quant_conv": (bool, ()),
    "latent_scale": (tuple, (int, float)),
    "latent_shift": (tuple, (int, float)),
    "pixel_scale": ((int, float), ()),
    "pixel_shift": ((int, float), ()),
    "weights_sha256": (str, ()),
    "source": (str, ()),
}


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A VAE's decoder D, and the scale and shift from the network's latents z to D's.

    picture = pixel_scale D(latent_scale z + latent_shift) + pixel_shift, in about [-1, 1]

    latent_scale and latent_shift have one value for each latent channel. block_out_channels goes from the finest level to the
    coarsest; each level has half the resolution of the one before. weights_sha256: the hash of the weights file in the bundle.
    source: where the weights come from. The other names are those of diffusers' config.json.
    """

    architecture: str = AUTOENCODER_KL
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    out_channels: int
    mid_block_add_attention: bool
    use_post_quant_conv: bool
    latent_scale: tuple[float, ...]
    latent_shift: tuple[float, ...]
    pixel_scale: float = 1.0
    pixel_shift: float = 0.0
    weights_sha256: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.architecture != AUTOENCODER_KL:
            raise BundleError(f"decoder '{self.architecture[:40]}' is unknown", remedy=f"give an {AUTOENCODER_KL}")
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not 1 <= len(widths) <= _MAX_LEVELS or not 1 <= groups <= min(widths) <= max(widths) <= _WIDEST:
            raise BundleError(
                f"a decoder with block_out_channels {list(widths)} and norm_num_groups {groups}, which are not supported",
                remedy="give another VAE",
            )
        if any(width % groups for width in widths):
            raise BundleError(f"{list(widths)} channels do not divide into {groups} groups", remedy="give another VAE")
        if not 1 <= self.layers_per_block <= _MAX_LAYERS or self.out_channels not in (1, 3):
            raise BundleError(
                f"a decoder of {self.layers_per_block} layers a block and {self.out_channels} output channels, "
                "which is not supported",
                remedy=f"give one with 1 to {_MAX_LAYERS} layers a block and 1 (grey) or 3 (colour) output channels",
            )
        numbers = (*self.latent_scale, *self.latent_shift, self.pixel_scale, self.pixel_shift)
        if not 1 <= len(self.latent_scale) == len(self.latent_shift) <= _WIDEST or not all(map(math.isfinite, numbers)):
            raise BundleError(
                "a decoder whose latent_scale and latent_shift do not match",
                remedy="give one finite number of each for each latent channel",
            )

    @classmethod
    def from_config(cls, config: object) -> "DecoderSpec":
        """The decoder in a config.json. Raises TypeError or BundleError if it does not describe one."""
        if not isinstance(config, Mapping):
            raise TypeError(f"decoder is {str(config)[:40]!r}")
        return cls(**_values(config, _DECODER_TYPES))

    @property
    def latent_channels(self) -> int:
        """The number of channels of the latents."""
        return len(self.latent_scale)

    def image_shape(self, noise_shape: ImageShape) -> ImageShape:
        """[C, H, W] of the pictures that are decoded from latents of shape `noise_shape`."""
        _, height, width = noise_shape
        factor = 2 ** (len(self.block_out_channels) - 1)
        return self.out_channels, factor * height, factor * width


def evaluations(steps: int) -> int:
    """The number of network evaluations for one image: 1 for one step, more for Heun's sampler (EDM, arXiv 2206.00364)."""
    # Heun's method evaluates the network twice a step. The last step ends at noise level 0 and needs one evaluation only.
    return 2 * steps - 1


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is needed to run a model, and where it comes from.

    noise_shape: [C, H, W] of the noise and of the network's output.
    latents: whether the network's output is a VAE's latents. decoder: decodes them to pictures; None to return the latents.
    num_classes: 0 for an unconditional model.
    sigma_init: the noise level that a one-step generator's noise is scaled to.
    steps: 1 for a one-step generator; a teacher has more and is sampled with EDM's Heun sampler.
    """

    name: str
    noise_shape: ImageShape
    latents: bool = False
    decoder: DecoderSpec | None = None
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    sigma_init: float = DEFAULT_SIGMA_INIT
    steps: int = 1
    network: str = "ddpmpp"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    licence: str = "unknown"

    def __post_init__(self) -> None:
        # NFC, because macOS stores accents as separate characters: such names look the same but compare as different.
        object.__setattr__(self, "class_names", tuple(unicodedata.normalize("NFC", name) for name in self.class_names))
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

        if self.decoder is not None and (not self.latents or self.noise_shape[0] != self.decoder.latent_channels):
            raise BundleError(
                f"a decoder of latents of {self.decoder.latent_channels} channels does not fit a network that makes "
                f"{'latents' if self.latents else 'images'} of {self.noise_shape[0]} channels",
                remedy="give the decoder of the VAE whose latents the network makes",
            )

    @property
    def makes_pictures(self) -> bool:
        """Whether the output is a picture. Otherwise it is a VAE's latents: float32, never rounded to bytes."""
        return not self.latents or self.decoder is not None

    @property
    def image_shape(self) -> ImageShape:
        """[C, H, W] of the output: of the picture if `makes_pictures`, else of the latents."""
        return self.noise_shape if self.decoder is None else self.decoder.image_shape(self.noise_shape)

    @property
    def max_decoder_batch(self) -> int | None:
        """The most images that an engine may decode at once, to bound the decoder's memory; None without a decoder."""
        _, height, width = self.image_shape
        return None if self.decoder is None else max(1, _PIXELS_AT_ONCE // (height * width))

    def images_for_check(self, wanted: int) -> int:
        """The number of images for a check: `wanted`, or fewer with a decoder (8 of 512x512), whose images take seconds."""
        return wanted if self.max_decoder_batch is None else min(wanted, 4 * self.max_decoder_batch)

    def class_id(self, label: int | str) -> int:
        """The id of a class that is given by its name, its id, or its id in digits.

        If a label is both a name and an id, the name counts. If all names are numbers (1, 2, 3 for the ids 0, 1, 2), digits are
        read as names only.

        Raises RequestError for an unknown class, or a name that several classes share.
        """
        name = unicodedata.normalize("NFC", label) if isinstance(label, str) else None
        if name in self.class_names:
            return self._id_of_name(str(name))
        is_id = label.isdecimal() if isinstance(label, str) else not isinstance(label, bool)
        number = int(label) if is_id and len(str(label)) < 10 else -1
        if not 0 <= number < self.num_classes:
            fault = "outside" if is_id else "neither a class name nor an id in"
            raise RequestError(
                f"class {str(label)[:40]} is {fault} 0..{self.num_classes - 1}",
                remedy=f"{self._nearest(str(label))}'uni-instruct inspect' lists the classes",
                param="classes",
            )
        if name is not None and self.class_names and all(other.isdecimal() for other in self.class_names):
            raise RequestError(
                f"no class is named {name}, and ids are not accepted because all class names are numbers",
                remedy=f"give a name, such as {self.class_names[number]} for the class with id {number}",
                param="classes",
            )
        return number

    def _id_of_name(self, name: str) -> int:
        ids = [at for at, other in enumerate(self.class_names) if other == name]
        if len(ids) > 1:
            raise RequestError(
                f"{len(ids)} classes are named {name[:40]}", remedy=f"give an id: {', '.join(map(str, ids))}", param="classes"
            )
        return ids[0]

    def _nearest(self, label: str) -> str:
        """The class names that are most similar to a misspelt label, for an error's remedy; empty if none is similar."""
        by_folded = {name.casefold(): name for name in self.class_names}
        near = difflib.get_close_matches(label[:100].casefold(), by_folded, n=3, cutoff=0.5)
        return f"the nearest are {', '.join(by_folded[name] for name in near)}; " if near else ""

    def class_name(self, class_id: int) -> str:
        """The name of a class, or its id in digits if the classes have no names."""
        return self.class_names[class_id] if self.class_names else str(class_id)

    def to_config(self) -> dict[str, object]:
        """The fields for config.json. image_shape is added for human readers of the file; `from_config` computes it again."""
        values = asdict(self)
        return {"name": values.pop("name"), "image_shape": list(self.image_shape), **values}

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "ModelSpec":
        """The spec in a config.json of any format version. Raises TypeError or BundleError if it does not describe one."""
        config = _as_format_2(config) if config.get("format_version") == 1 else config
        decoder = config.get("decoder")
        values = _values(config, _FIELD_TYPES)
        return cls(**values, decoder=None if decoder is None else DecoderSpec.from_config(decoder))


def _as_format_2(config: Mapping[str, object]) -> dict[str, object]:
    """A config of format 1 in format 2. Format 1 had one shape for noise and image, and no field for latents.

    In format 1, models with a number of channels other than 1 or 3 made latents.
    """
    if "image_shape" not in config:
        raise TypeError("image_shape is missing")
    shape = config["image_shape"]
    latents = isinstance(shape, list) and len(shape) == 3 and shape[0] not in (1, 3)
    return {**config, "noise_shape": shape, "latents": latents}


def _values(config: Mapping[str, object], types: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The config's values for the fields in `types`, with lists as tuples. Raises TypeError for a value of a wrong type."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in types}
    for name, value in values.items():
        _check_type(name, value, *types[name])
    return values


def check_name(name: str) -> None:
    """Raise RequestError unless a new model's name is one line of text: it is used in cards, JSON and file names."""
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        shown = name if len(name) <= MAX_NAME_LENGTH else f"{name[:40]}..."
        remedy = f"give a line of text of up to {MAX_NAME_LENGTH} characters, such as mine"
        raise RequestError(f"name '{shown}' is not valid", remedy=remedy, param="name")


def _check_type(name: str, value: Any, type_: Any, entries: Any) -> None:
    parts = value if entries and isinstance(value, tuple) else ()
    if not isinstance(value, type_) or not all(isinstance(part, entries) for part in parts):
        raise TypeError(f"{name} is {str(value)[:40]!r}")
    if type_ is not bool and any(isinstance(part, bool) for part in (value, *parts)):
        raise TypeError(f"{name} is {value}")
