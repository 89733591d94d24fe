# ruff: noqa: E501
"""Files and calls that the core refuses (data, scores, networks, decoders, noise, ports), and how each remedy is followed."""

import json
import pickle
import re
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.bundles import random_bundle
from builders.data_sets import arrays_dataset, grey_zip, npy, zip_of
from builders.remedies import first_choice
from builders.remedy_stages import GREY, network, said
from builders.remedy_values import Value, found
from builders.vae import vae_spec, write_vae
from uni_instruct.bundle import Bundle
from uni_instruct.checkpoints.architecture import infer_architecture
from uni_instruct.checkpoints.autoencoder_kl import WEIGHTS, read_decoder
from uni_instruct.checkpoints.budget import reading
from uni_instruct.checkpoints.fit import check_fit, finite
from uni_instruct.checkpoints.import_bundle import ImportRequest, attach_decoder, bundle_from_checkpoint
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.evaluate.class_draw import draw_classes
from uni_instruct.evaluate.classifier import load_classifier, trained_classifier
from uni_instruct.evaluate.evaluator import Evaluator, check_shape
from uni_instruct.evaluate.extractors import Extractor, choose_extractor
from uni_instruct.evaluate.statistics import Statistics, open_reference, write_statistics
from uni_instruct.networks.build import build_preconditioning
from uni_instruct.noise import checked_inputs, noise, walk_points
from uni_instruct.sampling.forms import FORMS, read_samples
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import atomic_file
from uni_instruct.system.ports import free_address

PLAIN = ModelSpec(name="plain", noise_shape=(1, 8, 8))
NAMED = ModelSpec(name="named", noise_shape=(1, 8, 8), num_classes=2, class_names=("0", "1"))
DIGITS = np.zeros((64, 8, 8, 1), np.uint8)
MOMENTS = npy(np.ones((8, 2, 2), np.float32))


def latents(tmp: Path, second: bytes = MOMENTS) -> Dataset:
    return open_dataset(zip_of(tmp / "x.zip", {"a.npy": MOMENTS, "b.npy": second}))


def stored(dataset: Dataset) -> np.ndarray:
    return dataset.stored(range(len(dataset)))


def two_sets(tmp: Path) -> Path:
    for name in ("a", "b"):
        (tmp / "x" / name).mkdir(parents=True, exist_ok=True)
        (tmp / "x" / name / "1.png").write_bytes(GREY)
        (tmp / "x" / name / "dataset.json").write_text(json.dumps({"labels": [["1.png", 0]]}))
    return tmp / "x"


def labelled(tmp: Path, *pairs: list[object]) -> np.ndarray:
    return stored(open_dataset(zip_of(tmp / "x.zip", {"a.png": GREY, "b.png": GREY}, {"labels": list(pairs)})))


def named(tmp: Path, other: str) -> Dataset:
    """Two data sets of two classes each, as one; the second's second class is called so."""
    for name, second in (("a", "dog"), ("b", other)):
        zip_of(
            tmp / f"{name}.zip",
            {"1.png": GREY, "2.png": GREY},
            {"labels": [["1.png", 0], ["2.png", 1]], "class_names": ["cat", second]},
        )
    return open_dataset(f"{tmp}/a.zip,{tmp}/b.zip")


def unlabelled(tmp: Path) -> Dataset:
    return open_dataset(grey_zip(tmp / "u.zip", range(64), side=8))


def statistics(tmp: Path, **made_by: str) -> Path:
    size = 2048 if not made_by else 8
    write_statistics(Statistics(name="x", mu=np.zeros(size), sigma=np.eye(size), **made_by), tmp / "s.npz")
    return tmp / "s.npz"


class _Pixels(torch.nn.Module):
    """Features that are the pixels: no weights to train or to fetch."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.float().flatten(1)
        return pixels, pixels


PIXELS = Extractor(name="pixels", sha256="", dim=64, module=_Pixels())


def scored(reference: Any = "digits", ids: Any = None, extractor: Any = PIXELS) -> object:
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    opened = open_reference(str(reference))
    return Evaluator(opened, extractor)(images, ids, ["fd"])


def features(count: int) -> object:
    return PIXELS([DIGITS[:count]] if count else [])


def classified(tmp: Path, content: bytes | None) -> object:
    """A classifier of the cache, which is trained anew where there is none."""
    path = tmp / "c.safetensors"
    path.unlink(missing_ok=True)
    return load_classifier(path) if content is not None and path.write_bytes(content) else "trained when it is needed"


def pickled(tmp: Path, content: object) -> object:
    (tmp / "x.pkl").write_bytes(pickle.dumps(content))
    return open_reference(tmp / "x.pkl")


def config(tmp: Path, text: str) -> object:
    bundle = random_bundle(tmp / "b", 1) if not (tmp / "b").exists() else tmp / "b"
    if text:
        (tmp / "b" / "config.json").write_text(text)
    return bundle and Bundle.open(tmp / "b")


def latent_bundle(tmp: Path) -> Bundle:
    return Bundle.open(tmp / "l") if (tmp / "l").exists() else random_bundle(tmp / "l", 1, image_shape=(4, 8, 8), latents=True)


def with_decoder(tmp: Path, remedy: str) -> object:
    """The command that the remedy gives, with a VAE of the disk in place of the hub's."""
    assert re.fullmatch(r"add the VAE's decoder: uni-instruct import \S+ --decoder hf://\S+ --out tiny-pictures", remedy)
    made = attach_decoder(latent_bundle(tmp), str(vae(tmp)), tmp / "tiny-pictures")
    made.check_makes_pictures()
    return made


def vae(tmp: Path, **changes: Any) -> Path:
    write_vae(tmp / "vae", **changes)
    return tmp / "vae"


def imported(tmp: Path, **asked: Any) -> object:
    weights = (
        random_bundle(tmp / "b", 1).path / "model.safetensors" if not (tmp / "b").exists() else tmp / "b" / "model.safetensors"
    )
    return bundle_from_checkpoint(weights, tmp / "out", ImportRequest(**asked))


def damaged_vae(tmp: Path, name: str, content: bytes | None) -> object:
    folder = vae(tmp)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    return read_decoder(str(folder))


def read_under(name: str, error: Exception | None) -> object:
    with reading(name):
        if error is not None:
            raise error
    return name


def written(path: Path) -> object:
    with atomic_file(path) as partial:
        return partial.write_text("x")


def listening(host: str, taken: bool) -> object:
    """An address for a server, on a port that another holds, or on one of the system's choice."""
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        return free_address(host, other.getsockname()[1] if taken else 0)


S, A, V, P = (
    "uni_instruct/spec.py",
    "uni_instruct/checkpoints/autoencoder_kl.py",
    "uni_instruct/data/vae_latents.py",
    "uni_instruct/system/ports.py",
)
E, C, N, L = (
    "uni_instruct/evaluate/evaluator.py",
    "uni_instruct/evaluate/classifier.py",
    "uni_instruct/noise.py",
    "uni_instruct/data/labels.py",
)
B, Y = "uni_instruct/bundle.py", "uni_instruct/networks/ddpmpp.py"
FourChannels = ModelSpec(name="four", noise_shape=(4, 8, 8))


def decoder(path: str, message: str, wrong: dict[str, Any], words: str, **right: Any) -> Value:
    return Value(path, message, lambda _: vae_spec(**wrong), lambda remedy, _: said(remedy, words, vae_spec(**right)))


DATA = [
    Value(L, "{} holds several data sets", lambda tmp: open_dataset(two_sets(tmp)), lambda remedy, tmp: said(remedy, "one by one", open_dataset(two_sets(tmp) / "a"))),
    Value(L, "{} holds several data sets", lambda tmp: open_dataset(two_sets(tmp)), lambda remedy, tmp: said(remedy, "separated by commas", open_dataset(f"{two_sets(tmp)}/a,{tmp}/x/b"))),
    Value(L, "(read_labels)", lambda tmp: labelled(tmp, ["a.png", 0]), lambda remedy, tmp: labelled(tmp, ["a.png", 0], ["b.png", int(said(remedy, "label every image", 1))])),
    Value(L, "(read_labels)", lambda tmp: labelled(tmp, ["a.png", "cat"], ["b.png", "dog"]),
          lambda remedy, tmp: open_dataset(zip_of(tmp / "x.zip", {"a.png": GREY, "b.png": GREY}, f'{{"labels": [["a.png", 0], ["b.png", 1]], {found("labels.: (.*)", remedy)}}}'))),
    Value(L, "{} has two labels", lambda tmp: labelled(tmp, ["a.png", 0], ["b.png", 1], ["b.png", 0]), lambda remedy, tmp: labelled(tmp, ["a.png", 0], ["b.png", int(said(remedy, "leave one of them out", 1))])),
    Value("uni_instruct/data/concat.py", "a class is '{}' in", lambda tmp: named(tmp, "owl"), lambda remedy, tmp: named(tmp, said(remedy, "with the same classes", "dog"))),
    Value("uni_instruct/data/dataset.py", "data set '{}' holds latents", lambda tmp: latents(tmp).require_images(),
          lambda remedy, tmp: said(remedy, "give the images", unlabelled(tmp)).require_images() is None),
    Value("uni_instruct/data/file_kinds.py", "{} holds latents", lambda tmp: [latents(tmp), open_dataset(tmp / "x.zip", resolution=4)],
          lambda remedy, tmp: said(remedy, "resize the images", open_dataset(unlabelled(tmp).source, resolution=4))),
    Value(V, "{} is {}, other latents are", lambda tmp: stored(latents(tmp, npy(np.ones((8, 4, 4), np.float32)))), lambda remedy, tmp: stored(latents(tmp, said(remedy, "at one resolution", MOMENTS)))),
    Value(V, "(_wrong)", lambda tmp: stored(latents(tmp, b"cut")), lambda remedy, tmp: stored(latents(tmp, said(remedy, "replace", MOMENTS)))),
]  # fmt: skip
SCORES = [
    Value("uni_instruct/evaluate/class_draw.py", "the reference has no frequencies", lambda tmp: draw_classes(NAMED, range(4), unlabelled(tmp), "data"),
          lambda remedy, tmp: draw_classes(NAMED, range(4), unlabelled(tmp), found(r"--classes (\w+)", remedy))),
    Value("uni_instruct/evaluate/class_draw.py", "the reference has no frequencies", lambda tmp: draw_classes(NAMED, range(4), unlabelled(tmp), "data"),
          lambda remedy, _: draw_classes(NAMED, range(4), said(remedy, "a data set with these classes", open_dataset("digits")), "data")),
    Value(C, "data set '{}' has {} classes and {} images, too few for a classifier", lambda tmp: trained_classifier(unlabelled(tmp)),
          lambda remedy, _: trained_classifier(arrays_dataset(np.arange(64 * 64, dtype=np.uint8).reshape(64, 8, 8, 1), np.arange(64) % int(found(r"least (\d) classes", remedy)), 2))),
    Value("uni_instruct/evaluate/classifier_file.py", "{} is not a classifier", lambda tmp: classified(tmp, b"cut"), lambda remedy, tmp: classified(tmp, said(remedy, "remove that file", None))),
    Value(E, "(score_batches)", lambda _: scored(ids=["a"] * 64), lambda remedy, _: scored(ids=[0] * (64 if "an id for each" in remedy else 0))),
    Value(E, "class id {} is outside", lambda _: scored(ids=[10] * 64, extractor="classifier"), lambda remedy, _: scored(ids=[9] * (64 if "the reference's numbering" in remedy else 0), extractor="classifier")),
    Value(E, "{} class ids were given", lambda _: scored(ids=[0]), lambda remedy, _: scored(ids=[0] * (64 if "one for each image" in remedy else 0))),
    Value(E, "images of shape {} cannot", lambda _: check_shape((1, 16, 16), (1, 8, 8)), lambda remedy, _: check_shape((1, 16, 16), open_dataset("digits", resolution=said(remedy, "data prepare --resolution'", 16)).image_shape) is None),
    Value(E, "the statistics of {} were made by {}, not", lambda tmp: scored(statistics(tmp, extractor="x-classifier"), extractor="inception"),
          lambda remedy, _: scored(said(remedy, "or give the data set itself", "digits"))),
    Value(E, "the classifier of the statistics", lambda tmp: scored(statistics(tmp, extractor="x-classifier", fingerprint="0" * 64), extractor="auto"),
          lambda remedy, _: scored(said(remedy, "the data set itself as --reference", "digits"))),
    Value("uni_instruct/evaluate/extractors.py", "there are no images", lambda _: features(0), lambda remedy, _: features(int("at least one" in remedy))),
    Value("uni_instruct/evaluate/extractors.py", "extractor '{}' is unknown", lambda _: choose_extractor("clip", open_dataset("digits")), lambda remedy, _: choose_extractor(first_choice(remedy), open_dataset("digits"))),
    Value("uni_instruct/evaluate/statistics.py", "{} contains no reference statistics", lambda tmp: pickled(tmp, {"a": 1}), lambda remedy, tmp: said(remedy, "an .npz of mu and sigma", open_reference(statistics(tmp)))),
]  # fmt: skip
BUNDLES = [
    Value(B, "{} makes a VAE's latents", lambda tmp: latent_bundle(tmp).check_makes_pictures(), lambda remedy, tmp: with_decoder(tmp, remedy)),
    Value(B, "{} is not the configuration", lambda tmp: config(tmp, "[]"), lambda remedy, tmp: said(remedy, "give a folder that 'train' wrote", random_bundle(tmp / "other", 1))),
    Value(A, "{} is not safetensors", lambda tmp: damaged_vae(tmp, WEIGHTS, pickle.dumps({})), lambda remedy, tmp: said(remedy, "as diffusers saves it", read_decoder(str(vae(tmp))))),
    Value(A, "there is no {} beside", lambda tmp: damaged_vae(tmp, "config.json", None), lambda remedy, tmp: said(remedy, "with its config.json beside it", read_decoder(str(vae(tmp))))),
    Value(A, "(_spec)", lambda tmp: read_decoder(str(vae(tmp, _class_name="VQModel"))), lambda remedy, tmp: said(remedy, "of an AutoencoderKL", read_decoder(str(vae(tmp))))),
    Value(A, "the VAE {} has {} channels", lambda tmp: read_decoder(str(vae(tmp, latent_channels=16))), lambda remedy, tmp: said(remedy, "the VAE that the network", read_decoder(str(vae(tmp))))),
    Value(A, "{} does not describe a decoder", lambda tmp: read_decoder(str(vae(tmp, block_out_channels="x"))), lambda remedy, tmp: said(remedy, "as diffusers saves it", read_decoder(str(vae(tmp))))),
    Value(A, "{} describes {}", lambda tmp: read_decoder(str(vae(tmp, out_channels=2))), lambda remedy, tmp: read_decoder(str(vae(tmp, out_channels=int(found(r"or (\d) .colour. output", remedy)))))),
    Value("uni_instruct/checkpoints/source.py", "(opened)", lambda tmp: bundle_from_checkpoint(tmp / "none", tmp / "out", ImportRequest()), lambda remedy, tmp: said(remedy, "the path of a checkpoint", imported(tmp, name="x"))),
    Value("uni_instruct/checkpoints/budget.py", "cannot read {}", lambda _: read_under("x", PermissionError(13, "Permission denied")), lambda remedy, _: read_under("x", said(remedy, "make it readable", None))),
    Value("uni_instruct/checkpoints/fit.py", "weight {} holds values", lambda _: finite("w", np.array([np.nan])), lambda remedy, _: finite("w", said(remedy, "an earlier state", np.ones(1)))),
    Value("uni_instruct/checkpoints/fit.py", "weight {} is of type {}", lambda _: finite("w", np.ones(1, np.int8)), lambda remedy, _: finite("w", np.ones(1, np.int8).astype(found(r"as (float)s", remedy)))),
    Value("uni_instruct/checkpoints/fit.py", "the {} {}: {}{}", lambda _: check_fit("network", {"a": (1,)}, {"a": np.ones(1), "b": np.ones(1)}),
          lambda remedy, _: check_fit("network", {"a": (1,)}, said(remedy, "state_dict of that network alone", {"a": np.ones(1)})) is None),
    Value("uni_instruct/checkpoints/import_bundle.py", "{} makes pictures by itself", lambda tmp: attach_decoder(random_bundle(tmp / "p", 1), "vae", tmp / "o"),
          lambda remedy, tmp: said(remedy, "leave --decoder out", Bundle.open(tmp / "p")).check_makes_pictures() is None),
    Value("uni_instruct/checkpoints/state_dict_adapter.py", "the network is fed {} channels", lambda tmp: imported(tmp, patch=2), lambda remedy, tmp: imported(tmp, patch=said(remedy, "or leave it out", None))),
    Value("uni_instruct/checkpoints/architecture.py", "the weights are not those of a supported network", lambda _: infer_architecture({"a": np.zeros(1)}),
          lambda remedy, tmp: said(remedy, "a file of EDM, EDM2, SiD or Uni-Instruct", imported(tmp))),
    Value(S, "decoder '{}' is unknown", lambda _: vae_spec(architecture="vq"), lambda remedy, _: vae_spec(architecture=remedy.split()[-1])),
    decoder(S, "a decoder with block_out_channels", {"norm_num_groups": 0}, "give another VAE"),
    decoder(S, "{} channels do not divide into", {"norm_num_groups": 3}, "give another VAE"),
    decoder(S, "a decoder of {} layers", {"out_channels": 2}, "1 (grey) or 3 (colour) output channels", out_channels=3),
    decoder(S, "a decoder whose latent_scale", {"latent_scale": (1.0,)}, "one finite number of each for each latent channel"),
    Value(S, "a decoder of latents of {} channels", lambda _: ModelSpec(name="x", noise_shape=(8, 8, 8), latents=True, decoder=vae_spec()),
          lambda remedy, _: ModelSpec(name="x", noise_shape=said(remedy, "whose latents the network makes", (4, 8, 8)), latents=True, decoder=vae_spec())),
]  # fmt: skip
CALLED = [
    Value(N, "the walk has no seeds", lambda _: walk_points([], [0.0]), lambda remedy, _: walk_points(json.loads(found(r"such as (\[.*\])", remedy)), [0.0])),
    Value(N, "position {} is not on", lambda _: walk_points([7, 8], [1.5]), lambda remedy, _: walk_points([7, 8], [float(found(r"to (\d)", remedy))])),
    Value(N, "noise has shape {}, not [B", lambda _: checked_inputs(PLAIN, np.zeros((1, 8), np.float32), None), lambda remedy, _: checked_inputs(PLAIN, noise([1], said(remedy, "noise(seeds, spec.noise_shape)", PLAIN.noise_shape)), None)),
    Value(P, "host {} is unknown", lambda _: free_address("no.such.host.invalid", 0), lambda remedy, _: listening(said(remedy, "another --host", "127.0.0.1"), False)),
    Value(P, "(free_address)", lambda _: listening("127.0.0.1", True), lambda remedy, _: listening("127.0.0.1", bool("--port" not in remedy))),
    Value(P, "(free_address)", lambda _: listening("192.0.2.1", False), lambda remedy, _: listening(said(remedy, "another --host", "127.0.0.1"), False)),
    Value("uni_instruct/sampling/forms.py", "images of {} channels", lambda _: FORMS[".zip"].check(FourChannels, [1]), lambda remedy, _: FORMS[found(r"in (\.\w+)", remedy)].check(FourChannels, [1]) is None),
    Value("uni_instruct/sampling/forms.py", "{} holds no samples", lambda tmp: read_samples(grey_zip(tmp / "x.zip", [1])), lambda remedy, tmp: said(remedy, "uni_instruct.data.open_dataset reads other images", open_dataset(tmp / "x.zip"))),
    Value("uni_instruct/networks/blocks.py", "{} channels do not divide", lambda _: network("adm", channels_per_head=9), lambda remedy, _: network("adm", channels_per_head=9, model_channels=int(found(r"of (\d+)", remedy)))),
    Value("uni_instruct/system/files.py", "{} itself cannot be written", lambda _: written(Path("..")), lambda remedy, tmp: written(said(remedy, "name a file or folder in it", tmp / "x"))),
    Value(Y, "{} '{}' is unknown", lambda _: network(embedding_type="x"), lambda remedy, _: network(embedding_type=first_choice(remedy))),
    Value(Y, "resample_filter {}", lambda _: network(resample_filter=[1, 2, 1]), lambda remedy, _: [network(resample_filter=json.loads(taps)) for taps in re.findall(r"\[.*?\]", remedy)]),
    Value("uni_instruct/networks/edm2.py", "{} channels cannot be divided", lambda _: network("edm2", model_channels=24, channels_per_head=5), lambda remedy, _: network("edm2", model_channels=24, channels_per_head=said(remedy, "a channels_per_head that divides 48", 24))),
    Value("uni_instruct/networks/preconditioning.py", "preconditioning '{}'", lambda _: build_preconditioning({"name": "edm", "sigma_min": 5.0, "sigma_max": 1.0}),
          lambda remedy, _: build_preconditioning({"name": "edm", "sigma_min": said(remedy, "0 <= sigma_min < sigma_max", 0.0), "sigma_max": 1.0})),
    Value("uni_instruct/networks/unet.py", "(levels)", lambda _: network(side=9), lambda remedy, _: network(side=9, channel_mult=[1] * (int(found(r"fewer than (\d)", remedy)) - 1))),
]  # fmt: skip
