"""Build a spec's denoiser: the network, its preconditioning and patches, and its weights."""

import dataclasses
import inspect
import reprlib
from collections.abc import Callable, Mapping

import torch

from uni_instruct.bundle import Bundle
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.networks.adm import ADM
from uni_instruct.networks.ddpmpp import NCSNPP, SongUNet
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.edm2 import EDM2
from uni_instruct.networks.network import Network
from uni_instruct.networks.preconditioning import PRECONDITIONINGS, Preconditioning
from uni_instruct.networks.unet import ResolutionError
from uni_instruct.spec import ImageShape, ModelSpec

NETWORKS: dict[str, Callable[..., Network]] = {
    "ddpmpp": SongUNet,
    "ncsnpp": NCSNPP,
    "adm": ADM,
    "edm2": EDM2,
}

# Allowed values of network.patch: patch x patch pixels become the channels of one pixel of the network's input.
PATCHES = (1, 2, 4)


def build_denoiser(spec: ModelSpec) -> Denoiser:
    """The spec's denoiser with freshly initialised weights.

    Three keys of network_args belong to the denoiser: `sigma_data` (default 0.5), `preconditioning` (a name of PRECONDITIONINGS
    or {"name": ..., and its constants}; default EDM's) and `patch` (one of PATCHES; default 1). The others are arguments of the
    network.

    Raises RequestError for an unknown network or an invalid argument.
    """
    if spec.network not in NETWORKS:
        raise RequestError(
            f"network '{spec.network}' is unknown",
            remedy=f"choose one of {', '.join(NETWORKS)}",
            param="network",
        )
    args = dict(spec.network_args)
    if "out_channels" in args:
        raise RequestError(
            f"network.out_channels {args['out_channels']} cannot be set",
            remedy="leave it out: the image and the preconditioning determine it",
            param="network",
        )
    try:
        sigma_data = float(args.pop("sigma_data", 0.5))
        preconditioning = build_preconditioning(args.pop("preconditioning", "edm"), sigma_data)
        patch = args.pop("patch", 1)
        shape = patched_shape(spec.noise_shape, patch)
        # iDDPM's networks predict a variance too, in additional output channels.
        if preconditioning.out_factor > 1:
            args["out_channels"] = preconditioning.out_factor * shape[0]
        _check_arguments(spec.network, args)
        model = NETWORKS[spec.network](shape, spec.num_classes, **args)
    except ResolutionError as error:
        raise _too_coarse(spec.noise_shape, patch, error) from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        # torch's error names a group norm's argument, which is not an argument of the network.
        groups = "num_groups" in str(error)
        remedy = "give model_channels as a multiple of 32" if groups else "see docs/recipes.md for its arguments"
        raise RequestError(f"network '{spec.network}': {error}", remedy=remedy, param="network") from error
    return Denoiser(model, spec.noise_shape, spec.num_classes, preconditioning, patch=patch)


def _check_arguments(network: str, args: Mapping[str, object]) -> None:
    """Raises RequestError for an argument that this network does not have, and another may."""
    known = list(inspect.signature(NETWORKS[network]).parameters)
    for name in args:
        if name not in known:
            others = ", ".join(other for other, made in NETWORKS.items() if name in inspect.signature(made).parameters)
            remedy = "leave it out" + (f", or choose one of {others}" if others else "")
            raise RequestError(f"network '{network}' has no argument {name}", remedy=remedy, param="network")


def patched_shape(image_shape: ImageShape, patch: int) -> ImageShape:
    """[C, H, W] of the network's input. Raises RequestError if the patch is not in PATCHES or does not divide the image."""
    channels, height, width = image_shape
    check_patch(patch)
    if height % patch or width % patch:
        raise RequestError(
            f"network.patch {patch} does not divide images of {width}x{height}",
            remedy=f"choose {_fitting(image_shape, 1)}, or resize the data",
            param="network",
        )
    return channels * patch**2, height // patch, width // patch


def check_patch(patch: object) -> None:
    """Raise RequestError unless the patch is one of PATCHES."""
    if type(patch) is not int or patch not in PATCHES:  # `in` alone would accept True and 1.0, which equal 1
        known = ", ".join(map(str, PATCHES))
        raise RequestError(f"network.patch is {reprlib.repr(patch)}", remedy=f"choose one of {known}", param="network")


def _too_coarse(image_shape: ImageShape, patch: int, error: ResolutionError) -> RequestError:
    """The error for an input that has too few halvings for the levels, restated for the image and its patch."""
    if patch == 1:
        return RequestError(error.problem, remedy=error.remedy, param="network")
    _, height, width = image_shape
    fitting = _fitting(image_shape, error.divisor)
    first = f"choose network.patch {fitting}" if fitting else "resize the data"
    return RequestError(
        f"network.patch {patch} turns images of {width}x{height} into inputs of {width // patch}x{height // patch}, "
        f"which are not divisible by {error.divisor}",
        remedy=f"{first}, or use fewer than {error.level_count} levels",
        param="network",
    )


def _fitting(image_shape: ImageShape, divisor: int) -> str:
    """The patches whose resolution is a multiple of the divisor, in words; '' if there are none."""
    return " or ".join(str(p) for p in PATCHES if all(size % (p * divisor) == 0 for size in image_shape[1:]))


def build_preconditioning(asked: str | Mapping[str, object], sigma_data: float = 0.5) -> Preconditioning:
    """The preconditioning from its name, or from {"name": ..., and its constants}.

    Raises RequestError for an unknown name or constant, or a constant out of range.
    """
    constants = dict(asked) if isinstance(asked, Mapping) else {"name": asked}
    name = constants.pop("name", None)
    if name not in tuple(PRECONDITIONINGS):  # a tuple, because a file may hold an unhashable value there
        raise RequestError(
            f"preconditioning '{name}' is unknown",
            remedy=f"choose one of {', '.join(PRECONDITIONINGS)}",
            param="network",
        )
    known = [field.name for field in dataclasses.fields(PRECONDITIONINGS[name])]
    if unknown := set(constants) - set(known):
        raise RequestError(
            f"preconditioning '{name}' has no constant '{min(unknown)}'",
            remedy=f"choose from {', '.join(known)}",
            param="network",
        )
    return PRECONDITIONINGS[name](**{"sigma_data": sigma_data} | constants)


def load_denoiser(bundle: Bundle) -> Denoiser:
    """The bundle's denoiser with its weights, in evaluation mode. Raises BundleError if a weight is missing or unexpected."""
    with torch.device("meta"):  # skips the initial weights, which would cost time and memory and be replaced at once
        denoiser = build_denoiser(bundle.spec)
    weights = {name: torch.from_numpy(array) for name, array in bundle.weights().items()}
    try:
        denoiser.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise BundleError(
            f"weights of {bundle.path} do not fit its network: {problem}",
            remedy="copy or download the whole folder again",
        ) from error
    return denoiser.eval()
