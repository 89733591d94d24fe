"""A folder of images or latents: classes are its sub-folders, or what a `dataset.json` beside the images says."""

from pathlib import Path

from uni_instruct.data.dataset import Dataset
from uni_instruct.data.file_kinds import AS_THEY_ARE, ImageForm, content_of, data_files, dataset_of, passed_over_note
from uni_instruct.data.labels import read_description, read_meta
from uni_instruct.data.storage import FolderStore

FOLDER_REMEDY = "give a folder of images, or of one sub-folder for each class"


def open_folder(path: Path, form: ImageForm = AS_THEY_ARE) -> Dataset:
    """The images below a folder, sorted by name. Every file's header is read now, its pixels when they are asked for.

    Without `dataset.json`, images in sub-folders have those as classes, sorted; images beside each other have none.
    Raises FileFormatError where there are none, sizes are mixed (without a resolution), or a class is empty.
    """
    store = FolderStore(path)
    names = store.names()
    found = data_files(store, names, FOLDER_REMEDY)
    meta = read_meta(store, names)
    description = read_description(store, found.files, meta)
    # Every header: nobody has looked at a folder of photographs, and training would meet the odd one after hours.
    content = content_of(store, found, form, every_header=True)
    unlabelled = description.labels is None and not meta.has_labels
    return dataset_of(content, description, passed_over_note(found, store, unlabelled))
