"""Make a bundle of a checkpoint's file, with a record of its origin."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from uni_instruct import __version__
from uni_instruct.bundle import CARD, CONFIG, Bundle, check_place
from uni_instruct.card_usage import usage
from uni_instruct.checkpoints.autoencoder_kl import StoredDecoder, read_decoder
from uni_instruct.checkpoints.checkpoint import Checkpoint, StoredNetwork, read_checkpoint
from uni_instruct.checkpoints.latent_map import LatentMap, find_latent_map, stated_latent_map
from uni_instruct.checkpoints.sharded import content_sha256
from uni_instruct.checkpoints.state_dict_adapter import Translation, translate
from uni_instruct.errors import RequestError
from uni_instruct.hub import fetch, is_on_hub
from uni_instruct.spec import DEFAULT_SIGMA_INIT, TEACHER_STEPS, ModelSpec, check_name
from uni_instruct.system.files import cache_folder, refuse_file_name
from uni_instruct.system.progress import ProgressFactory, silent

# Networks of a training state that denoise at every noise level, and are therefore teachers.
DENOISERS = ("fake_score", "fake_score_state", "true_score", "true_score_state")
# Names of the average of the weights, which every project publishes and scores.
PREFERRED = ("ema", "G_ema", "G_ema_state", "net_ema", "ema_net", "ema_model", "model_ema", "student_ema")
_AVERAGE = re.compile(r"(?:^|[._ ])(?:ema|averaged?)(?:$|[._ ])", re.IGNORECASE)
_OTHERS = re.compile(r"(?:^|[._ ])(?:fake_score|true_score|real_score|teacher|discriminator|disc|critic|D)(?:$|[._ ])")
# EDM's and EDM2's code and weights are NVIDIA's. A file that names their classes was trained with them.
NVIDIAS_LICENCE = "CC-BY-NC-SA-4.0, as far as it derives from NVIDIA's EDM"
UNKNOWN_LICENCE = "unknown: that of the file's source"

_CARD = """---
library_name: uni-instruct
pipeline_tag: unconditional-image-generation
license: other
tags: [{tags}]
---
# {name}

{summary} Imported from `{file}` ({format}, network `{network}`, sha256 `{digest}`).

## Use
```
{usage}
```

Licence: {licence}. Nothing was measured at import: `uni-instruct evaluate` does.
"""
_DECODER_TITLE = "## Decoder"
_DECODER_CARD = f"""
{_DECODER_TITLE}
The network makes a VAE's latents. Pictures are made of them by the decoder of `{{source}}`, whose licence is its own.
"""


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What the file does not say. None takes what its format suggests.

    role: 'generator' (one step) or 'teacher' (many). network: its name in the file. sigma_init: the noise level of a one-step
    generator's input. steps: of the teacher's sampler. origin: the address of a file from the hub. patch: the side of the
    squares of pixels that the network takes as one. latents: if the file does not say, the network makes a VAE's latents,
    scaled as in EDM2. decoder: a source for `read_decoder`; it implies latents.
    """

    role: str | None = None
    network: str | None = None
    name: str | None = None
    sigma_init: float = DEFAULT_SIGMA_INIT
    steps: int = TEACHER_STEPS
    licence: str | None = None
    origin: str = ""
    patch: int | None = None
    latents: bool = False
    decoder: str | None = None


def bundle_from_checkpoint(path: Path, out: Path, request: ImportRequest, with_progress: ProgressFactory = silent) -> Bundle:
    """Write the file's network as a bundle into `out`. with_progress: progress of a decoder's reference images.

    Raises FileFormatError if the file cannot be read safely, RequestError if it lacks what is requested.
    """
    from uni_instruct.networks.reference import make_reference

    _check_place(out)
    if request.name is not None:
        check_name(request.name)
    checkpoint = read_checkpoint(path)
    stored = choose_network(checkpoint, request.network)
    translation = translate(stored, request.patch)
    # The last condition: the config.json of a bundle is beside its weights.
    asked = request.latents or request.decoder is not None or stored.config.get("latents") is True
    latents = find_latent_map(checkpoint.facts, translation.image_shape[0], asked)
    spec = _spec(path, checkpoint, stored, translation, latents, request)
    if latents is None or request.decoder is None:
        return Bundle.write(out, spec, translation.weights, _card(spec), reference=make_reference)
    decoder = read_decoder(request.decoder, latents)
    return _write_decoded(out, spec, translation.weights, _card(spec), decoder, with_progress)


def attach_decoder(bundle: Bundle, decoder: str, out: Path, with_progress: ProgressFactory = silent) -> Bundle:
    """The bundle with that decoder, written to `out`, which may be its own folder. Engines are not copied.

    decoder: a source for `read_decoder`. Raises RequestError if the bundle makes pictures itself, and as `read_decoder`.
    """
    if not bundle.spec.latents:
        raise RequestError(f"{bundle.origin} makes pictures by itself", remedy="leave --decoder out", param="decoder")
    if out.resolve() != bundle.path.resolve():
        _check_place(out)
    stored = read_decoder(decoder, stated_latent_map(bundle.spec.provenance))
    # Without the section of a former decoder, which is the last of the card.
    card = (bundle.path / CARD).read_text().partition(f"\n{_DECODER_TITLE}")[0]
    return _write_decoded(out, bundle.spec, bundle.weights(), card, stored, with_progress, bundle.stored_precision())


def _write_decoded(
    out: Path,
    spec: ModelSpec,
    weights: Mapping[str, np.ndarray],
    card: str,
    decoder: StoredDecoder,
    with_progress: ProgressFactory,
    precision: str = "fp32",
) -> Bundle:
    from uni_instruct.networks.reference import make_reference

    decoded = replace(spec, decoder=decoder.spec)
    return Bundle.write(
        out,
        decoded,
        weights,
        card.replace(usage(spec), usage(decoded)) + _DECODER_CARD.format(source=decoder.spec.source),
        precision=precision,
        decoder=decoder.weights,
        reference=partial(make_reference, with_progress=with_progress),
    )


def open_or_import(source: str, role: str, latents: bool = False) -> Bundle:
    """Open a bundle, or import a checkpoint's file once and keep the bundle in the cache. role: as in ImportRequest.

    latents: the data are a VAE's latents; it is used if the file does not say what its network makes. source: anything that
    `Bundle.open` takes, a path, or hf://owner/name/file. Raises as `Bundle.open` and `bundle_from_checkpoint`.
    """
    origin, path = source, Path(source)
    if is_on_hub(source):
        download = fetch(source)
        origin, path = download.origin, download.path
    if not path.is_file():
        return Bundle.open(source)
    # Cached by the file's hash and this version, so another file of the same name, or a corrected reader, is imported again.
    made_of = f"{content_sha256(path)}-{__version__}"
    folder = cache_folder() / "imported" / f"{made_of}-{role}"
    if not (folder / CONFIG).is_file():
        try:
            bundle_from_checkpoint(path, folder, ImportRequest(role=role, origin=origin))
        except RequestError as error:
            if error.param != "latents" or not latents:
                raise
            # In a separate folder: with other data, nothing would say that these are latents.
            folder = folder.with_name(f"{made_of}-latents-{role}")
            if not (folder / CONFIG).is_file():
                bundle_from_checkpoint(path, folder, ImportRequest(role=role, origin=origin, latents=True))
    return Bundle.open(folder)


def _check_place(out: Path) -> None:
    """Raise RequestError if an import would replace what no import made, such as a training, which may be lost for good."""
    refuse_file_name(out)
    check_place(out)
    if (out / CONFIG).is_file() and "imported" not in Bundle.open(out).spec.provenance:
        raise RequestError(f"{out} holds a bundle that was not imported", remedy="name another folder", param="out")


def choose_network(checkpoint: Checkpoint, name: str | None) -> StoredNetwork:
    """The network of that name, by default the average. Raises RequestError if the file has no network of that name."""
    networks = {network.name: network for network in checkpoint.networks}
    if name is None:
        name = _default_network(list(networks))
    if name not in networks:
        remedy = f"choose one of {', '.join(networks)}"
        raise RequestError(f"the file holds no network '{name}'", remedy=remedy, param="network")
    return networks[name]


def _default_network(names: list[str]) -> str:
    """The first of PREFERRED, else a network whose name says 'average', else one that is no teacher or critic."""
    called_average = [name for name in names if _AVERAGE.search(name) and not _OTHERS.search(name)]
    generators = [name for name in names if not _OTHERS.search(name)]
    return next((name for name in PREFERRED if name in names), [*called_average, *generators, *names][0])


def likely_role(checkpoint: Checkpoint, stored: StoredNetwork) -> str:
    """'teacher' or 'generator', judged by what the file holds beside the network."""
    # EDM and EDM2 keep a denoiser's loss in the file; snapshots of SiD and its successors hold nothing but the average.
    return "teacher" if "loss_fn" in checkpoint.facts or stored.name in DENOISERS else "generator"


def _spec(
    path: Path,
    checkpoint: Checkpoint,
    stored: StoredNetwork,
    translation: Translation,
    latents: LatentMap | None,
    request: ImportRequest,
) -> ModelSpec:
    role = request.role or likely_role(checkpoint, stored)
    provenance: dict[str, object] = {
        "imported": {
            "file": request.origin if is_on_hub(request.origin) else path.name,
            "sha256": content_sha256(path),
            "format": checkpoint.format,
            "network": stored.name,
            "class": stored.class_name or "read off the weights",
            "left_out": list(translation.left_out),
            **({} if latents is None else {"latents": latents.to_json()}),
        },
        "uni_instruct": __version__,
    }
    return translation.spec(
        name=request.name or re.sub(r"[^\w.-]+", "-", path.stem),
        sigma_init=request.sigma_init,
        steps=1 if role == "generator" else request.steps,
        latents=latents is not None,
        provenance=provenance,
        licence=request.licence or (NVIDIAS_LICENCE if stored.class_name else UNKNOWN_LICENCE),
    )


def _card(spec: ModelSpec) -> str:
    imported, one_step = spec.provenance["imported"], spec.steps == 1
    assert isinstance(imported, dict)
    return _CARD.format(
        name=spec.name,
        tags="one-step, diffusion-distillation" if one_step else "diffusion",
        summary="A one-step image generator." if one_step else f"A diffusion model, sampled with {spec.steps} steps.",
        file=imported["file"],
        format=imported["format"],
        network=imported["network"],
        digest=imported["sha256"],
        usage=usage(spec) if one_step else f"{usage(spec)}\nuni-instruct train RECIPE --set teacher=. data=DATA.zip",
        licence=spec.licence,
    )
