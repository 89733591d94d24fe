"""What a folder or zip holds: pictures, or where there are none, latents."""

from typing import Any

from uni_instruct.data.image_files import PictureReader, common_shape, is_picture, picture_shape
from uni_instruct.data.storage import Store, naturally_sorted
from uni_instruct.data.vae_latents import CHANNELS, LatentReader, is_latent, read_moments
from uni_instruct.errors import FileFormatError, RequestError


def data_files(store: Store, names: list[str], remedy: str) -> tuple[list[str], bool]:
    """The pictures, in natural order, or where there are none the latents, and whether it is those.

    Raises FileFormatError where there is neither.
    """
    for belongs in (is_picture, is_latent):
        files = naturally_sorted(filter(belongs, names))
        if files:
            return files, belongs is is_latent
    raise FileFormatError(f"{store.path} has no images", remedy=remedy)


def content_fields(
    store: Store, files: list[str], latents: bool, resolution: int | None, *, every_header: bool
) -> dict[str, Any]:
    """The fields of a Dataset that the files themselves tell: image_shape, reader, latents.

    The first file's shape is taken for all; with every_header, pictures' sizes are compared now, and not when they are read.
    Raises FileFormatError, or RequestError where latents are to be resized.
    """
    if latents:
        if resolution is not None:
            raise RequestError(
                f"{store.path} holds latents, which cannot be resized", remedy="resize the images, then encode them"
            )
        height, width = read_moments(store, files[0]).shape[1:]
        return {
            "image_shape": (CHANNELS, height, width),
            "reader": LatentReader(store, files, (height, width)),
            "latents": True,
        }
    any_size = resolution is not None
    shape = common_shape(store, files, any_size) if every_header else picture_shape(store, files[0])
    height, width = (resolution, resolution) if resolution is not None else shape[:2]
    return {
        "image_shape": (shape[2], height, width),
        "reader": PictureReader(store, files, (height, width), shape[2], resize=any_size),
    }
