"""The output forms of a finished sample set: a folder of PNGs or tars, an npz, a zip. All are written atomically."""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, cast

import numpy as np

from uni_instruct.data import write_zip
from uni_instruct.data.edm_zip import META, PICTURE_NAME, dataset_meta
from uni_instruct.data.image_files import decode
from uni_instruct.data.labels import RECORD
from uni_instruct.data.storage import UNREADABLE, FolderStore, Store, ZipStore, reason_of
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.images import encode
from uni_instruct.sampling.sample_set import RequestFacts, Samples, SampleSet
from uni_instruct.sampling.tar_shards import read_tar_folder, request_of_tar_folder, write_tar_folder
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import JSON_ERRORS, atomic_file, atomic_folder, is_named_as_file

# The name of the images in an npz, or of a VAE's latents if there is no decoder.
IMAGES, LATENTS = "arr_0", "latents"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed date, so that the same set always makes the same bytes


@dataclass(frozen=True, kw_only=True)
class Form:
    """The functions of one output form.

    check: raises RequestError if the form cannot hold these samples. write: writes a set to a path.
    read_request: reads the request only. read: reads the set, or its first images if a count is given.
    """

    check: Callable[[ModelSpec, Sequence[int]], None]
    write: Callable[[SampleSet, Path], None]
    read_request: Callable[[Path], object]
    read: Callable[[Path, int | None], Samples]
    is_folder: bool = False


def form_of(out: Path) -> Form:
    """The form for the suffix of `out`; a folder for no or an unknown suffix. Raises RequestError for other file types."""
    suffix = out.suffix.lower()
    if suffix not in FORMS and is_named_as_file(out):
        tars = ", or for tar shards a folder that ends in .wds" if suffix == ".tar" else ""
        remedy = f"give a folder, or a file that ends in .npz or .zip{tars}"
        raise RequestError(f"--out {out} has the unsupported suffix {suffix}", remedy=remedy, param="out")
    return FORMS.get(suffix, FORMS[""])


def finished_request(out: Path) -> RequestFacts | None:
    """The request of the finished set at `out`; None if there is something else or nothing."""
    try:
        found = form_of(out).read_request(out)
    except (OSError, *JSON_ERRORS, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return cast(RequestFacts, found) if isinstance(found, dict) else None


def work_folder(out: Path) -> Path:
    """The folder that holds a set's shards until all of them are done."""
    return out.resolve().with_name(f".{out.resolve().name}.partial")


def check_finished(path: Path) -> None:
    """Raise RequestError if `generate` has started this set and not finished it."""
    if not path.exists() and work_folder(path).is_dir():
        raise RequestError(
            f"the samples of {path} are not finished: the shards made so far are in {work_folder(path)}",
            remedy="run the same 'generate' again, without --shard, or wait for its other shards",
            param="path",
        )


def read_samples(path: str | Path, count: int | None = None) -> Samples:
    """Read a set that `generate` wrote: a folder of PNGs or tars, an npz or a zip.

    count: read only the first images; None for all.

    Raises RequestError if there is no finished set, FileFormatError if it is damaged.
    """
    path = Path(path)
    check_finished(path)
    if not path.exists():
        raise RequestError(f"there are no samples at {path}", remedy="give what 'generate --out' wrote", param="path")
    try:
        return form_of(path).read(path, count)
    except RequestError:
        raise
    except UNREADABLE as error:
        raise FileFormatError(
            f"{path} holds no samples that can be read: {reason_of(error)}",
            remedy="give what 'generate --out' wrote; uni_instruct.data.open_dataset reads other images",
            param="path",
        ) from error


def write_folder(samples: SampleSet, out: Path) -> None:
    """Write a folder of PNGs named by seed.

    dataset.json has the classes, in EDM's format. samples.json has the request, the seeds and each file's SHA-256.
    """
    names, hashes = _names_by_seed(samples.seeds), []
    with atomic_folder(out) as partial:
        pictures = (image for part in samples.parts() for image in part)
        for name, image in zip(names, pictures, strict=True):
            content = encode(image)
            hashes.append(hashlib.sha256(content).hexdigest())
            (partial / name).write_bytes(content)
        (partial / META).write_text(json.dumps(dataset_meta(samples.dataset(), names)))
        (partial / RECORD).write_text(samples.record(sha256=hashes))


def write_zip_file(samples: SampleSet, out: Path) -> None:
    """Write a zip in EDM's format, as `data prepare` does, with an additional samples.json."""
    with atomic_file(out) as partial:
        write_zip(samples.dataset(), partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.writestr(zipfile.ZipInfo(RECORD, _EPOCH), samples.record())


def write_npz(samples: SampleSet, out: Path) -> None:
    """Write an npz with arr_0 (uint8 [N, H, W, C], as ADM's evaluator reads it), seeds, class_ids and the request.

    A VAE's latents are stored as `latents`, float32 [N, C, H, W], so that no tool mistakes them for images.
    """
    arrays = {"seeds": np.array(samples.seeds, dtype=np.int64), "request": np.array(json.dumps(samples.request))}
    if samples.class_ids is not None:
        arrays["class_ids"] = samples.class_ids
    parts = samples.parts()
    first = next(parts)
    shape, member = (len(samples.reader), *first.shape[1:]), IMAGES if samples.spec.makes_pictures else LATENTS
    with atomic_file(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(zipfile.ZipInfo(f"{member}.npy", _EPOCH), "w", force_zip64=True) as file:
            write_npy(file, first.dtype, shape, chain([first], parts))
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def write_npy(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write an .npy file part by part. If the disk is full, the OSError has its errno, unlike that of NumPy's own writer."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part).data)


def _request_of_folder(out: Path) -> object:
    return json.loads((out / RECORD).read_text())["request"]


def _request_of_zip(out: Path) -> object:
    with zipfile.ZipFile(out) as archive:
        return json.loads(archive.read(RECORD))["request"]


def _request_of_npz(out: Path) -> object:
    with np.load(out, allow_pickle=False) as file:
        return json.loads(str(file["request"]))


def _read_folder(out: Path, count: int | None) -> Samples:
    return _read_pictures(FolderStore(out), _names_by_seed, count)


def _read_zip(out: Path, count: int | None) -> Samples:
    return _read_pictures(ZipStore(out), _names_in_zip, count)


def _read_pictures(store: Store, names_of: Callable[[Sequence[int]], list[str]], count: int | None) -> Samples:
    record, meta = (json.loads(store.read(name)) for name in (RECORD, META))
    seeds = record["seeds"]
    names = names_of(seeds)[:count]
    labels = meta["labels"] and dict(meta["labels"])
    return Samples(
        images=np.stack([decode(store, name) for name in names]),
        seeds=np.array(seeds[:count], dtype=np.int64),
        class_ids=None if labels is None else np.array([labels[name] for name in names], dtype=np.int64),
        request=record["request"],
    )


def _read_npz(out: Path, count: int | None) -> Samples:
    with np.load(out, allow_pickle=False) as file:
        class_ids = file["class_ids"][:count] if "class_ids" in file.files else None
        seeds, request = file["seeds"][:count], json.loads(str(file["request"]))
        name = LATENTS if LATENTS in file.files else IMAGES
    # Read from the zip directly: NumPy would read all images, even if only the first ones are needed.
    with zipfile.ZipFile(out) as archive, archive.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        rows = min(shape[0], shape[0] if count is None else count)
        data = member.read(rows * math.prod(shape[1:]) * dtype.itemsize)
    images = np.frombuffer(bytearray(data), dtype).reshape(rows, *shape[1:])
    return Samples(images=images, seeds=seeds, class_ids=class_ids, request=request)


def _names_in_zip(seeds: Sequence[int]) -> list[str]:
    return [PICTURE_NAME.format(folder=index // 1000, index=index) for index in range(len(seeds))]


def _names_by_seed(seeds: Sequence[int]) -> list[str]:
    width = max(6, len(str(max(seeds))))
    return [f"{seed:0{width}d}.png" for seed in seeds]


def _check_pictures(spec: ModelSpec, seeds: Sequence[int]) -> None:
    if not spec.makes_pictures:
        raise RequestError(
            f"generator '{spec.name}' makes a VAE's latents, which cannot be PNGs",
            remedy="give an --out that ends in .npz, or give it a decoder with 'uni-instruct import BUNDLE --decoder VAE'",
            param="out",
        )
    if spec.image_shape[0] not in (1, 3):
        raise RequestError(f"images of {spec.image_shape[0]} channels cannot be PNGs", remedy="give an --out that ends in .npz")


def _check_named_by_seed(spec: ModelSpec, seeds: Sequence[int]) -> None:
    _check_pictures(spec, seeds)
    if len(set(seeds)) < len(seeds):
        raise RequestError(
            f"{len(seeds) - len(set(seeds))} seeds are repeated, but the files of a folder are named by seed",
            remedy="give each seed once, or an --out that ends in .npz or .zip",
            param="seeds",
        )


def _check_nothing(spec: ModelSpec, seeds: Sequence[int]) -> None:
    """Accept everything: an npz and tars can hold images and latents of any shape, and repeated seeds."""


# Suffix of the output -> its form. Suffixes that are not here and not in _FILE_SUFFIXES belong to folders.
FORMS = {
    "": Form(
        check=_check_named_by_seed, write=write_folder, read_request=_request_of_folder, read=_read_folder, is_folder=True
    ),
    ".npz": Form(check=_check_nothing, write=write_npz, read_request=_request_of_npz, read=_read_npz),
    ".wds": Form(
        check=_check_nothing,
        write=write_tar_folder,
        read_request=request_of_tar_folder,
        read=read_tar_folder,
        is_folder=True,
    ),
    ".zip": Form(check=_check_pictures, write=write_zip_file, read_request=_request_of_zip, read=_read_zip),
}
