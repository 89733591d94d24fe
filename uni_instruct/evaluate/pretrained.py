"""CLIP's and DINOv2's features, if their weights are on this machine. They are up to 900 MB large and are not downloaded.

Images are prepared as in torch-fidelity: resized to the network's input by TensorFlow 1's bilinear interpolation without
antialiasing, and normalised as in the network's training. EDM2 and dgm-eval resize differently, so their numbers differ.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate.fidelity import create_extractor, fidelity
from uni_instruct.system.files import sha256

if TYPE_CHECKING:
    import torch

DINO_SIDE = 224
# ImageNet's mean and standard deviation by channel, for values 0..255.
_MEAN, _DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A network's weights. places: paths to search, in this order. url: the download. sha256: '' if it is unknown."""

    places: tuple[Path, ...]
    url: str
    sha256: str = ""


class PretrainedNetwork(NamedTuple):
    """A module from images uint8 [B, 3, H, W] to features float32 [B, dim] and empty logits [B, 0].

    side: the height and width in pixels to which it resizes images.
    """

    module: "torch.nn.Module"
    dim: int
    side: int


def find_weights(name: str, path: Path | None = None) -> tuple[Path, str]:
    """The file with a network's weights, and its SHA-256. path: the user's file; by default the usual places are searched.

    Raises RequestError if there is no file, FileFormatError if its SHA-256 is not the published one.
    """
    file = weight_file(name)
    found = path or next((place for place in file.places if place.is_file()), None)
    if found is None or not found.is_file():
        missing = f"{path} is missing" if path else f"the weights of {name} are not on this machine"
        raise RequestError(
            missing,
            remedy=f"put {file.places[0].name} from {file.url} into {file.places[0].parent}, "
            "or give the file with --extractor-weights",
            param="extractor",
        )
    digest = sha256(found)
    if file.sha256 and digest != file.sha256:
        raise FileFormatError(
            f"{found} is not {name}: its SHA-256 is {digest[:8]}..., not {file.sha256[:8]}...",
            remedy=f"get it from {file.url}",
            param="extractor",
        )
    return found, digest


def open_network(name: str, path: Path) -> PretrainedNetwork:
    """The network with the weights of a file. Raises FileFormatError if they are not this network's."""
    import torch

    # The networks draw random weights before they load the real ones. The fork preserves the caller's random state.
    with torch.random.fork_rng(devices=[]):
        network, dim, side = _clip(name, path) if name.startswith("clip") else _dino(path)
    return PretrainedNetwork(_without_logits(network), dim, side)


def weight_file(name: str) -> WeightFile:
    """Where the weights of an extractor are, by its name."""
    import torch

    hub = Path(torch.hub.get_dir()) / "checkpoints"
    if name.startswith("clip"):
        clip = fidelity("feature_extractor_clip")
        facts = clip.MODEL_METADATA[name]
        own = Path.home() / ".cache" / "clip" / f"{facts['filename']}.pt"  # the cache of OpenAI's package
        return WeightFile(places=(hub / f"{name}-{facts['hash']}.pt", own), url=clip.MODEL_URLS[name], sha256=facts["hash"])
    model = name.removeprefix("dinov2-vit-").replace("-", "")  # 'b14'
    file = f"dinov2_vit{model}_pretrain.pth"
    return WeightFile(places=(hub / file,), url=f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{model}/{file}")


def _clip(name: str, path: Path) -> tuple["torch.nn.Module", int, int]:
    # The file is a TorchScript archive, which can contain code. `find_weights` has verified the published hash before.
    network: Any = create_extractor(name, ["clip"], path)
    return network, int(network.model.visual.output_dim), int(network.resolution)


def _dino(path: Path) -> tuple["torch.nn.Module", int, int]:
    """DINOv2 for images 0..255. torch-fidelity's version downloads and runs code; this one only reads a weights file."""
    import torch

    from uni_instruct.networks.dinov2 import DinoV2

    try:
        network = DinoV2.from_weights(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # from unpickling, missing names or wrong shapes
        raise FileFormatError(
            f"{path} holds no weights of DINOv2: {' '.join(str(error).split())[:120]}",
            remedy="give dinov2_vits14, vitb14 or vitl14_pretrain.pth",
            param="extractor",
        ) from error
    resize = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x

    class Normalised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1))
            self.register_buffer("deviation", torch.tensor(_DEVIATION).reshape(1, 3, 1, 1))

        def forward(self, images: "torch.Tensor") -> tuple["torch.Tensor"]:
            resized = resize(images.float(), size=(DINO_SIDE, DINO_SIDE), align_corners=False)
            return (self.network((resized - self.mean) / self.deviation),)

    return Normalised(), network.dim, DINO_SIDE


def _without_logits(network: "torch.nn.Module") -> "torch.nn.Module":
    """Wrap the network to return its features and empty logits, as extractors must."""
    import torch

    class WithoutLogits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
            (features,) = self.network(images)
            return features, features.new_empty(len(features), 0)

    return WithoutLogits()
