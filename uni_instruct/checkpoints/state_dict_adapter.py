"""Translate a stored network in the names of EDM and EDM2 to a spec and weights of this package. No weight may be left over."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uni_instruct.checkpoints.architecture import infer_architecture
from uni_instruct.checkpoints.checkpoint import StoredNetwork
from uni_instruct.checkpoints.fit import SAVE_ALONE, check_fit, finite, weight_mismatch
from uni_instruct.checkpoints.prefixes import is_counter, split_weights
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.spec import ImageShape, ModelSpec


@dataclass(frozen=True, kw_only=True)
class ArgumentMap:
    """A class of EDM or EDM2: its name here, and which of its arguments are used. Arguments have the same names here.

    ignored: arguments that change no image. defaults: those of the class that differ from the defaults here.
    """

    name: str
    arguments: frozenset[str]
    ignored: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_UNET = frozenset({"model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout"})
NETWORK_ARGUMENTS = {
    "SongUNet": ArgumentMap(
        name="ddpmpp",
        arguments=_UNET
        | {"augment_dim", "channel_mult_noise", "embedding_type", "encoder_type", "decoder_type", "resample_filter"},
        ignored=frozenset({"label_dropout"}),
        defaults={"channel_mult": [1, 2, 2, 2]},
    ),
    "DhariwalUNet": ArgumentMap(name="adm", arguments=_UNET | {"augment_dim"}, ignored=frozenset({"label_dropout"})),
    "UNet": ArgumentMap(
        name="edm2",
        arguments=_UNET
        | {"channel_mult_noise", "label_balance", "concat_balance", "resample_filter"}
        | {"res_balance", "attn_balance", "clip_act", "channels_per_head"},
    ),
}
_RANGE = frozenset({"sigma_min", "sigma_max"})
PRECONDITIONING_ARGUMENTS = {
    "EDMPrecond": ArgumentMap(name="edm", arguments=_RANGE | {"sigma_data"}),
    "Precond": ArgumentMap(
        name="edm",
        arguments=frozenset({"sigma_data"}),
        ignored=frozenset({"logvar_channels", "force_normalization", "use_gan"}),
    ),
    "VPPrecond": ArgumentMap(name="vp", arguments=frozenset({"beta_d", "beta_min", "M", "epsilon_t"}), ignored=_RANGE),
    "VEPrecond": ArgumentMap(name="ve", arguments=_RANGE),
    "iDDPMPrecond": ArgumentMap(name="iddpm", arguments=frozenset({"C_1", "C_2", "M"}), ignored=_RANGE),
}
# The network inside a preconditioning if the file does not say: the default of that class in EDM and EDM2.
DEFAULT_NETWORKS = {
    "EDMPrecond": "DhariwalUNet",
    "Precond": "UNet",
    "VPPrecond": "SongUNet",
    "VEPrecond": "SongUNet",
    "iDDPMPrecond": "DhariwalUNet",
}
# Classes of SiDA and Uni-Instruct, which can also stop after the encoder. Their weights are those of EDM's classes.
ALIASES = {
    "EDMPrecond_EncoderDecoder": "EDMPrecond",
    "EDM_2_Precond_EncoderDecoder": "Precond",
    "EDM_2_Precond_Generator": "Precond",
    "SongUNet_EncoderDecoder": "SongUNet",
    "DhariwalUNet_EncoderDecoder": "DhariwalUNet",
    "UNet_EncoderDecoder": "UNet",
}
# Far beyond any network of these classes. With larger values, building the network to compare weights would take forever.
ARGUMENT_LIMITS = {"num_blocks": 64, "M": 10_000, "img_resolution": 8192, "img_channels": 1024}
MAX_ARGUMENT, MAX_LIST_LENGTH = 1_000_000, 32
# Arguments of every preconditioning. They are read by name below, or change no image.
COMMON = frozenset({"img_resolution", "img_channels", "label_dim", "model_type", "use_fp16"})


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A network in this package's names. left_out: tensors that only the original's training needs."""

    image_shape: ImageShape
    num_classes: int
    network: str
    network_args: dict[str, Any]
    weights: dict[str, np.ndarray]
    left_out: tuple[str, ...]

    def spec(self, **more: Any) -> ModelSpec:
        """The bundle's spec. more: the fields of ModelSpec that the file does not state."""
        return ModelSpec(
            noise_shape=self.image_shape,
            num_classes=self.num_classes,
            network=self.network,
            network_args=self.network_args,
            **more,
        )


def translate(stored: StoredNetwork, patch: int | None = None) -> Translation:
    """The stored network, with its weights under this package's names.

    patch: the side of the squares of pixels that the network takes as one. Weights do not show it: they are the same as for
    smaller images with more channels. None takes the patch of a bundle's config.json beside the file, else 1, as in EDM's
    networks.

    Raises RequestError for an unknown class or argument; FileFormatError if weights are missing, left over, of another shape,
    or not finite.
    """
    bare, outer = split_weights(stored.tensors)
    class_name, config = (stored.class_name, stored.config) if stored.class_name else infer_architecture(bare)
    class_name = _known(class_name, PRECONDITIONING_ARGUMENTS, "preconditioning")
    network_name = _known(str(config.get("model_type", DEFAULT_NETWORKS[class_name])), NETWORK_ARGUMENTS, "network")
    preconditioning, network = PRECONDITIONING_ARGUMENTS[class_name], NETWORK_ARGUMENTS[network_name]
    _check_arguments(config, preconditioning, network)
    patch = _patch_beside(stored) if patch is None else patch
    args = _chosen(config, network) | {"preconditioning": {"name": preconditioning.name, **_chosen(config, preconditioning)}}
    translation = Translation(
        image_shape=_image_shape(int(config["img_channels"]), int(config["img_resolution"]), patch),
        num_classes=int(config.get("label_dim", 0)),
        network=network.name,
        network_args=args | ({"patch": patch} if patch > 1 else {}),
        weights={f"model.{name}": finite(name, array) for name, array in bare.items()},
        left_out=tuple(outer),
    )
    _check_weights(translation)  # first: it builds the network, which refuses arguments of the wrong kind
    _check_filters(bare, args.get("resample_filter", (1, 1)))
    _check_outer(outer, translation)
    return translation


def _patch_beside(stored: StoredNetwork) -> int:
    """The patch in a bundle's config.json beside the file; 1 if there is none."""
    args = {} if stored.class_name else stored.config.get("network_args")
    patch: int = args.get("patch", 1) if isinstance(args, dict) else 1
    return patch


def _image_shape(channels: int, size: int, patch: int) -> ImageShape:
    """[C, H, W] of the images, from that of the network's input. Raises RequestError if the patch does not fit."""
    from uni_instruct.networks.build import check_patch

    check_patch(patch)
    if channels % patch**2:
        raise RequestError(
            f"the network is fed {channels} channels, which do not divide into patches of {patch}x{patch} pixels",
            remedy="give the patch that it was trained with, or leave it out",
            param="patch",
        )
    return channels // patch**2, size * patch, size * patch


def _known(name: str, table: Mapping[str, ArgumentMap], what: str) -> str:
    name = ALIASES.get(name, name)
    if name not in table:
        raise RequestError(
            f"{what} '{name}' is not supported", remedy=f"give a file with one of {', '.join(table)}", param="checkpoint"
        )
    return name


def _check_arguments(config: Mapping[str, Any], *maps: ArgumentMap) -> None:
    # An unknown argument might change images, and a network without it would silently be another one.
    known = COMMON.union(*(known.arguments for known in maps), *(known.ignored for known in maps))
    unknown = sorted(set(config) - known)
    if unknown:
        raise RequestError(
            f"the network was made with '{unknown[0]}', which is not supported",
            remedy="import a file of EDM, EDM2, SiD or Uni-Instruct",
            param="checkpoint",
        )
    for name, least in (("img_resolution", 1), ("img_channels", 1), ("label_dim", 0)):
        value = config.get(name, 0)
        if type(value) is not int or value < least:
            raise _implausible(name, value)
    for name, value in config.items():
        if not _is_plausible(name, value):
            raise _implausible(name, value)


def _is_plausible(name: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= MAX_LIST_LENGTH and all(
            isinstance(part, int | float) and _is_plausible(name, part) for part in value
        )
    if isinstance(value, int | float):
        return abs(value) <= ARGUMENT_LIMITS.get(name, MAX_ARGUMENT) or (name == "sigma_max" and value == math.inf)
    return value is None or (isinstance(value, str) and len(value) <= 100)


def _implausible(name: str, value: Any) -> FileFormatError:
    return FileFormatError(f"the file gives {str(value)[:60]!r} for {name}", remedy="download it again")


def _chosen(config: Mapping[str, Any], names: ArgumentMap) -> dict[str, Any]:
    """The arguments that the map uses, with the defaults of the original class."""
    # EDM's largest noise level is infinity, which JSON cannot store. It is the default here too.
    given = {name: config[name] for name in sorted(names.arguments) if name in config and config[name] != math.inf}
    return {**names.defaults, **given}


def _check_outer(outer: Mapping[str, np.ndarray], translation: Translation) -> None:
    """Check the weights outside the network: EDM2's estimate of uncertainty, and iDDPM's table of noise levels."""
    for name, array in outer.items():
        if is_counter(name) or name.startswith(("logvar_fourier.", "logvar_linear.")):
            continue  # counters of wrappers, and EDM2's weights for its loss; no image depends on them
        if name != "u":
            raise weight_mismatch("network", "holds weights that are not its own", [name], SAVE_ALONE)
        from uni_instruct.networks.preconditioning import IDDPM

        constants = {key: value for key, value in translation.network_args["preconditioning"].items() if key != "name"}
        table = IDDPM(**constants).table if translation.network_args["preconditioning"]["name"] == IDDPM.name else np.zeros(0)
        if array.shape != table.shape or not np.allclose(array, table, rtol=1e-3):
            raise FileFormatError("the file's table of noise levels is not iDDPM's", remedy="download it again")


def _check_filters(tensors: Mapping[str, np.ndarray], taps: Sequence[float]) -> None:
    """Check the resampling filters. They are stored, but follow from the configuration, and must agree with it."""
    expected = np.outer(taps, taps) / np.sum(taps) ** 2
    for name, array in tensors.items():
        if name.endswith("resample_filter") and not np.allclose(array, expected, atol=1e-6):
            remedy = "download it again"
            raise FileFormatError(f"filter {name} is not {list(taps)}, as the network's arguments say", remedy=remedy)


def _check_weights(translation: Translation) -> None:
    import torch

    from uni_instruct.networks.build import build_denoiser

    # On the device "meta", a network has shapes but takes no memory.
    with torch.device("meta"):
        denoiser = build_denoiser(translation.spec(name="imported"))
    expected = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    check_fit("network", expected, translation.weights)
