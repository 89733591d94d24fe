"""Find out from a file whether its network makes pictures or a VAE's latents, and how to map these to the VAE's own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from uni_instruct.data.vae_latents import FINAL_STD, RAW_MEAN, RAW_STD
from uni_instruct.errors import FileFormatError, RequestError

# The names of EDM2's two encoders in its files.
_PICTURES, _LATENTS = "StandardRGBEncoder", "StabilityVAEEncoder"


@dataclass(frozen=True, kw_only=True)
class LatentMap:
    """The map from a network's latents z to its VAE's: raw = scale z + shift, with one value per channel."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def to_json(self) -> dict[str, list[float]]:
        """The map as provenance holds it."""
        return {"scale": list(self.scale), "shift": list(self.shift)}


# EDM2's map. `data.vae_latents` scales training data accordingly.
EDM2_LATENTS = LatentMap(scale=tuple(std / FINAL_STD for std in RAW_STD), shift=RAW_MEAN)


def find_latent_map(facts: Mapping[str, object], channels: int, asked: bool) -> LatentMap | None:
    """The map of the latents that a file's network makes, or None if it makes pictures. channels: those that it makes.

    The file's own encoder decides. If the file names none, `asked` does: the user says that the network makes latents, which
    are then taken as EDM2's. Raises RequestError if the two contradict each other or neither tells, FileFormatError if an
    encoder lacks its numbers.
    """
    encoder = facts.get("encoder")
    if isinstance(encoder, Mapping):
        return _of_encoder(encoder, channels, asked)
    if asked and channels != len(EDM2_LATENTS.scale):
        raise RequestError(
            f"the network makes {channels} channels, EDM2's latents have {len(EDM2_LATENTS.scale)}",
            remedy="leave out --latents and --decoder",
            param="latents",
        )
    if not asked and channels not in (1, 3):
        raise RequestError(
            f"the network makes {channels} channels, which are no picture, and the file does not say what they are",
            remedy="import it with --latents for a VAE's latents, or with --decoder VAE to make pictures of them",
            param="latents",
        )
    return EDM2_LATENTS if asked else None


def stated_latent_map(provenance: Mapping[str, object]) -> LatentMap:
    """The map of a bundle: the one that its file stated at import, else EDM2's, which training uses."""
    imported = provenance.get("imported")
    stated = imported.get("latents") if isinstance(imported, dict) else None
    if stated is None:
        return EDM2_LATENTS
    scale, shift = (_numbers(stated, name) for name in ("scale", "shift"))
    return LatentMap(scale=scale, shift=shift)


def _of_encoder(encoder: Mapping[str, object], channels: int, asked: bool) -> LatentMap | None:
    name = encoder.get("class_name")
    if name == _PICTURES and asked:
        raise RequestError(
            f"the file says that its network makes pictures ({_PICTURES})",
            remedy="leave out --latents and --decoder",
            param="latents",
        )
    if name == _PICTURES:
        return None
    if name != _LATENTS:
        raise RequestError(
            f"the file's encoder '{str(name)[:40]}' is not supported", remedy=f"give a file with {_PICTURES} or {_LATENTS}"
        )
    scale, bias = _numbers(encoder, "scale"), _numbers(encoder, "bias")
    if not len(scale) == len(bias) == channels or 0 in scale:
        raise FileFormatError(
            f"the file's encoder has {len(scale)} scales and {len(bias)} biases, its network {channels} channels",
            remedy="download it again",
        )
    # EDM2 stores the inverse map: z = scale raw + bias.
    pairs = list(zip(scale, bias, strict=True))
    return LatentMap(scale=tuple(1 / a for a, _ in pairs), shift=tuple(-b / a for a, b in pairs))


def _numbers(values: object, name: str) -> tuple[float, ...]:
    found = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(part, int | float) and math.isfinite(part) for part in found):
        raise FileFormatError(f"{name} of the latents is {str(found)[:40]}, not a list of numbers", remedy="download it again")
    return tuple(map(float, found))
