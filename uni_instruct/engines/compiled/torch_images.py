"""From noise to images with a bundle's compiled network, for the torch engine."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uni_instruct.bundle import Bundle
from uni_instruct.engines.compiled.cache import compiled_file
from uni_instruct.engines.compiled.torch_library import CompiledLibrary
from uni_instruct.engines.record import EngineId
from uni_instruct.errors import UniInstructError
from uni_instruct.networks.autoencoder import load_decoder
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.denoiser import ClassLabels, MixedClasses
from uni_instruct.sampler import heun_sample


def compiled_images(bundle: Bundle, engine_id: EngineId) -> Callable[[Tensor, ClassLabels | None], Tensor]:
    """Load the compiled network, compiling it first if the cache does not have it. Returns a function from noise to images.

    The function takes noise float32 [B, *noise_shape] and classes (None without classes), and returns float32 [B, C, H, W].
    Raises CompilationError if the compiler fails, UniInstructError if the cached file is damaged.
    """
    library, spec = _load(bundle, engine_id), bundle.spec
    if spec.steps == 1:
        return lambda z, class_ids: library([z, *_mixture(class_ids)], (len(z), *spec.image_shape))
    denoiser, decoder = CompiledDenoiser(library, bundle), load_decoder(bundle)

    def sample(z: Tensor, class_ids: ClassLabels | None) -> Tensor:
        made = heun_sample(denoiser, z, class_ids, spec.steps)
        images: Tensor = made if decoder is None else decoder(made)
        return images

    return sample


class CompiledDenoiser:
    """The denoiser D(x; sigma), with the interface that the sampler needs: the call, and `preconditioning`."""

    def __init__(self, library: CompiledLibrary, bundle: Bundle):
        self._library = library
        with torch.device("meta"):  # its weights are in the library
            self.preconditioning = build_denoiser(bundle.spec).preconditioning

    def __call__(self, x: Tensor, sigma: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """The expected clean image of x, float32 [B, *noise_shape], at noise level sigma [B, 1, 1, 1]; same shape as x."""
        return self._library([x, sigma, *_mixture(class_ids)], x.shape)


def _load(bundle: Bundle, engine_id: EngineId) -> CompiledLibrary:
    with compiled_file(bundle, engine_id) as path:
        try:
            return CompiledLibrary(path)
        except (OSError, AttributeError) as error:
            problem = " ".join(str(error).split())[:200]
            raise UniInstructError(
                f"{path} cannot be loaded: {problem}", remedy="delete it to have it compiled again", param="engine"
            ) from error


def _mixture(class_ids: ClassLabels | None) -> Sequence[Tensor]:
    """The classes as inputs of the compiled code: none, or a mixture's three, as the code is compiled for mixtures only."""
    if class_ids is None:
        return ()
    if isinstance(class_ids, MixedClasses):
        return class_ids
    return MixedClasses(class_ids, class_ids, torch.zeros(len(class_ids)))
