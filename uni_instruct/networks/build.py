"""From a spec to its denoiser."""

import torch

from uni_instruct.bundle import Bundle, GeneratorSpec
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.preconditioning import EDM
from uni_instruct.networks.song import SongUNet

NETWORKS = {"ddpmpp": SongUNet}


def build_denoiser(spec: GeneratorSpec) -> Denoiser:
    """The spec's denoiser with fresh weights. Raises RequestError for an unknown network or argument."""
    if spec.network not in NETWORKS:
        raise RequestError(
            f"network '{spec.network}' is unknown",
            remedy=f"choose one of {', '.join(NETWORKS)}",
            param="network",
        )
    args = dict(spec.network_args)
    try:
        sigma_data = float(args.pop("sigma_data", 0.5))
        model = NETWORKS[spec.network](spec.image_shape, spec.num_classes, **args)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise RequestError(f"network '{spec.network}': {error}", remedy="see docs/recipes.md for its arguments") from error
    return Denoiser(model, spec.image_shape, spec.num_classes, EDM(sigma_data=sigma_data))


def load_denoiser(bundle: Bundle) -> Denoiser:
    """The bundle's denoiser with its weights, in evaluation mode. Raises BundleError unless every weight is accounted for."""
    denoiser = build_denoiser(bundle.spec)
    weights = {name: torch.from_numpy(array) for name, array in bundle.weights().items()}
    try:
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise BundleError(
            f"weights of {bundle.path} do not fit its network: {problem}",
            remedy="copy the whole folder again",
        ) from error
    return denoiser.eval()
