"""A folder of images or latents. Its classes are its sub-folders, or what a `dataset.json` in it says."""

from pathlib import Path

from uni_instruct.data.dataset import Dataset
from uni_instruct.data.file_kinds import AS_THEY_ARE, ImageForm, content_of, data_files, dataset_of, skipped_note
from uni_instruct.data.labels import read_description, read_meta
from uni_instruct.data.storage import FolderStore

FOLDER_REMEDY = "give a folder of images, or of one sub-folder for each class"


def open_folder(path: Path, form: ImageForm = AS_THEY_ARE) -> Dataset:
    """The images below a folder, in natural order. Every file's header is read now, its pixels on demand.

    Without labels in `dataset.json`, the sub-folders are the classes, in natural order; if all images are in one folder, there
    are none.
    Raises FileFormatError if there are no images, sizes are mixed (without a resolution), or a class folder is empty.
    """
    store = FolderStore(path)
    names = store.names()
    found = data_files(store, names, FOLDER_REMEDY)
    meta = read_meta(store, names)
    description = read_description(store, found.files, meta)
    # Every header: a folder of photographs was not checked before, and training would fail at a wrong size after hours.
    content = content_of(store, found, form, every_header=True)
    unlabelled = description.labels is None and not meta.has_labels
    return dataset_of(content, description, skipped_note(found, store, unlabelled))
