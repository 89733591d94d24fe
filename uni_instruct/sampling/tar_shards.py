"""A sample set as a folder of tar shards in webdataset's format, with a manifest of their hashes.

Each image has the members NUMBER.png (or .npy for latents and other shapes), NUMBER.json (its seed) and, with classes,
NUMBER.cls (its class id). The division into tars depends only on the images' size, and a tar's bytes only on its images.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from uni_instruct.data.edm_zip import dataset_meta
from uni_instruct.data.tar_files import LIBRARY, MANIFEST, TarStore, class_ids_of, decoded_member, image_members
from uni_instruct.errors import FileFormatError
from uni_instruct.generate import sample_format
from uni_instruct.images import encode
from uni_instruct.sampling.sample_set import READ_BATCH, Samples, SampleSet
from uni_instruct.system.files import atomic_folder, sha256

# The most images of a tar, and about the most bytes of pixels. Large enough for fast sequential reads, small enough that each
# data loading worker of a training gets some tars.
TAR_IMAGES, TAR_BYTES = 10_000, 2**28


def write_tar_folder(samples: SampleSet, out: Path) -> None:
    """Write the tars, then the manifest: {library, request, dataset, files: [{name, images, bytes, sha256}], seeds}."""
    size, dtype = sample_format(samples.spec)
    per_tar = max(1, min(TAR_IMAGES, TAR_BYTES // (int(np.prod(size)) * dtype.itemsize)))
    total = len(samples.reader)
    with atomic_folder(out) as partial:
        files = []
        for number, start in enumerate(range(0, total, per_tar)):
            stop, path = min(start + per_tar, total), partial / f"{number:06d}.tar"
            with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for index, image in _numbered(samples, start, stop):
                    _add_image(archive, samples, index, image)
            facts = {"images": stop - start, "bytes": path.stat().st_size, "sha256": sha256(path)}
            files.append({"name": path.name} | facts)
        manifest = {"library": LIBRARY, "request": samples.request, "dataset": _described(samples), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest | {"seeds": list(samples.seeds)}))


def request_of_tar_folder(out: Path) -> object:
    """The request in the folder's manifest."""
    return json.loads((out / MANIFEST).read_text())["request"]


def read_tar_folder(out: Path, count: int | None) -> Samples:
    """Read the set, or its first `count` images. Raises FileFormatError if a tar's hash differs from the manifest's."""
    manifest = json.loads((out / MANIFEST).read_text())
    left = len(manifest["seeds"]) if count is None else count
    for file in manifest["files"]:
        if left > 0 and sha256(out / file["name"]) != file["sha256"]:
            raise FileFormatError(f"{out / file['name']} has changed since it was written", remedy="copy or generate it again")
        left -= file["images"]
    store = TarStore(out)
    names = image_members(store.names())[:count]
    return Samples(
        images=np.stack([decoded_member(store, name) for name in names]),
        seeds=np.array(manifest["seeds"][:count], dtype=np.int64),
        class_ids=class_ids_of(store, names),
        request=manifest["request"],
    )


def _described(samples: SampleSet) -> dict[str, object]:
    """The description of the set for the manifest. It omits the labels, which are beside each image in its tar."""
    described = dataset_meta(samples.dataset(), [str(index) for index in range(len(samples.reader))])
    return {name: value for name, value in described.items() if name != "labels"}


def _numbered(samples: SampleSet, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(start, stop, READ_BATCH):
        indices = np.arange(first, min(first + READ_BATCH, stop))
        yield from zip(indices.tolist(), samples.reader.read(indices), strict=True)


def _add_image(archive: tarfile.TarFile, samples: SampleSet, index: int, image: np.ndarray) -> None:
    facts: dict[str, object] = {"seed": int(samples.seeds[index])}
    members = {"png": encode(image)} if image.dtype == np.uint8 and image.shape[2] in (1, 3) else {"npy": _npy(image)}
    if samples.class_ids is not None:
        class_id = int(samples.class_ids[index])
        members["cls"] = str(class_id).encode()
        facts |= {"class_id": class_id, "class_name": samples.spec.class_name(class_id)}
    members["json"] = json.dumps(facts).encode()
    for suffix, content in members.items():
        entry = tarfile.TarInfo(f"{index:09d}.{suffix}")  # its time is 0, so that the same set always makes the same bytes
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def _npy(array: np.ndarray) -> bytes:
    file: IO[bytes] = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    file.seek(0)
    return file.read()
