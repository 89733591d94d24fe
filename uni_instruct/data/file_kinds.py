"""What a folder or zip holds: image files, or where there are none, latents."""

from dataclasses import dataclass

from uni_instruct.data.dataset import Dataset, ImageReader
from uni_instruct.data.image_files import ImageFileReader, common_shape, image_file_shape, is_image_file
from uni_instruct.data.labels import Description
from uni_instruct.data.storage import Store, naturally_sorted
from uni_instruct.data.vae_latents import CHANNELS, LatentReader, is_latent, read_moments
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.spec import ImageShape


@dataclass(frozen=True, kw_only=True)
class Content:
    """The fields of a Dataset that its files themselves give."""

    image_shape: ImageShape
    reader: ImageReader
    latents: bool = False


def data_files(store: Store, names: list[str], remedy: str) -> tuple[list[str], bool]:
    """The image files in natural order, or where there are none the latents; and whether they are latents.

    Raises FileFormatError where there is neither.
    """
    # Images win: an .npy among them is some other array, whereas among latents there are no images.
    for belongs in (is_image_file, is_latent):
        files = naturally_sorted(filter(belongs, names))
        if files:
            return files, belongs is is_latent
    raise FileFormatError(f"{store.path} has no images", remedy=remedy)


def content_of(store: Store, files: list[str], latents: bool, resolution: int | None, *, every_header: bool) -> Content:
    """Shape and reader of the files, which `data_files` has found.

    The first file's shape is taken for all. every_header: sizes of image files are compared now, and not when they are read.
    Raises FileFormatError where they differ, RequestError where latents are to be resized.
    """
    if latents:
        if resolution is not None:
            raise RequestError(
                f"{store.path} holds latents, which cannot be resized", remedy="resize the images, then encode them"
            )
        height, width = read_moments(store, files[0]).shape[1:]
        return Content(image_shape=(CHANNELS, height, width), reader=LatentReader(store, files, (height, width)), latents=True)
    any_size = resolution is not None
    shape = common_shape(store, files, any_size) if every_header else image_file_shape(store, files[0])
    height, width = (resolution, resolution) if resolution is not None else shape[:2]
    reader = ImageFileReader(store, files, (height, width), shape[2], resize=any_size)
    return Content(image_shape=(shape[2], height, width), reader=reader)


def dataset_of(content: Content, description: Description) -> Dataset:
    """The data set of what the files give and what is said of them. Raises FileFormatError where these do not fit."""
    return Dataset(**vars(content), **vars(description))
