"""`uni-instruct import`: convert another project's checkpoint to a bundle."""

import json
from pathlib import Path
from shlex import quote

import rich_click as click
from click.core import ParameterSource

from uni_instruct.bundle import USUAL_VAE, Bundle, is_bundle
from uni_instruct.commands.option_types import FiniteRange
from uni_instruct.errors import RequestError
from uni_instruct.hub import fetch, is_on_hub
from uni_instruct.spec import DEFAULT_SIGMA_INIT, TEACHER_STEPS, ImageShape
from uni_instruct.system.progress import progress

_TRAIN = "train RECIPE --set teacher={out} data=DATA.zip --out RUN"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("checkpoint")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle. An earlier import there is replaced."
)
@click.option(
    "--as",
    "role",
    type=click.Choice(["generator", "teacher"]),
    help="What the network is: a one-step generator, or a many-step teacher.  [default: teacher if the file names a "
    "denoiser's loss, else generator]",
)
@click.option("--network", help="Network to import from a training state.  [default: the generator's EMA]")
@click.option("--name", help="Name of the bundle.  [default: the file's]")
@click.option(
    "--sigma-init", default=DEFAULT_SIGMA_INIT, type=FiniteRange(1e-3, 1e4), help="Noise level of a generator's input."
)
@click.option("--steps", default=TEACHER_STEPS, type=click.IntRange(2, 1000), help="Steps of a teacher's sampler.")
@click.option(
    "--patch",
    type=click.IntRange(1, 4),
    help="Patch size of the network's input: 1, 2 or 4.  [default: from a bundle's config.json beside the file, else 1]",
)
@click.option(
    "--latents", is_flag=True, help="The network makes a VAE's latents, scaled as EDM2 does.  [default: detected from the file]"
)
@click.option(
    "--decoder",
    help="Decoder of those latents: folder or .safetensors of an AutoencoderKL as diffusers saves it, or hf://owner/name. "
    "CHECKPOINT may then be a bundle as well.",
)
@click.option("--licence", help="Licence of the weights.  [default: NVIDIA's for what derives from EDM, else unknown]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def import_checkpoint(
    checkpoint: str,
    out: Path,
    role: str | None,
    network: str | None,
    name: str | None,
    sigma_init: float,
    steps: int,
    patch: int | None,
    latents: bool,
    decoder: str | None,
    licence: str | None,
    as_json: bool,
) -> None:
    """Convert CHECKPOINT to a bundle: a file of EDM, EDM2, SiD, SiDA or Uni-Instruct, a state dict, or hf://owner/name/file.

    No code in the file is run. Every weight must be present and fit, or nothing is written. docs/checkpoints.md lists the
    formats; `uni-instruct inspect` shows what a file contains. With --decoder, CHECKPOINT may be a bundle that makes latents.

    Example: uni-instruct import cifar10-sid.pkl --out bundles/cifar10
    """
    from uni_instruct.checkpoints.import_bundle import ImportRequest, attach_decoder, bundle_from_checkpoint

    if is_bundle(checkpoint):
        bundle = attach_decoder(Bundle.open(checkpoint), _decoder_alone(checkpoint, decoder), out, progress)
        _report(bundle, guessed=False, as_json=as_json)
        return
    # The model card should name the address and its commit, not the path in the cache.
    path, origin = Path(checkpoint), ""
    if is_on_hub(checkpoint):
        download = fetch(checkpoint)
        path, origin = download.path, download.origin
    request = ImportRequest(
        role=role,
        network=network,
        name=name,
        sigma_init=sigma_init,
        steps=steps,
        licence=licence,
        origin=origin,
        patch=patch,
        latents=latents,
        decoder=decoder,
    )
    _report(bundle_from_checkpoint(path, out, request, progress), guessed=role is None, as_json=as_json)


def _decoder_alone(bundle: str, decoder: str | None) -> str:
    """The decoder to add to a bundle. Raises RequestError without one, or for an option whose value the bundle determines."""
    if decoder is None:
        remedy = "give --decoder VAE to add one, or a checkpoint's file"
        raise RequestError(f"{bundle} is a bundle already", remedy=remedy, param="checkpoint")
    context = click.get_current_context()
    assert context is not None, "called by a command"
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for name in sorted(set(given) - {"checkpoint", "out", "decoder", "as_json"}):
        option = "--as" if name == "role" else f"--{name.replace('_', '-')}"
        raise RequestError(
            f"{option} applies to checkpoints only, but {bundle} is a bundle", remedy=f"leave {option} out", param=name
        )
    return decoder


def _report(bundle: Bundle, *, guessed: bool, as_json: bool) -> None:
    spec, out = bundle.spec, bundle.path
    role, other = ("teacher", "generator") if spec.steps > 1 else ("generator", "teacher")
    if as_json:
        facts = {"bundle": str(out), "kind": role, "weights_sha256": bundle.weights_sha256, "network": spec.network}
        click.echo(json.dumps(facts | {"makes_pictures": spec.makes_pictures, "provenance": dict(spec.provenance)}))
        return
    guess = f" (assumed; give --as {other} if it is one)" if guessed else ""
    what = "" if spec.makes_pictures else " latents"
    click.echo(f"{role}{guess}: {out}, {spec.network} of {_size(spec.image_shape)}{what}, licence {spec.licence}")
    place = quote(str(out))
    use = f"serve {place}" if spec.makes_pictures else f"import {place} --decoder {USUAL_VAE} --out {place}"
    click.echo(f"next: uni-instruct {use if role == 'generator' else _TRAIN.format(out=place)}")


def _size(shape: ImageShape) -> str:
    channels, height, width = shape
    return f"{width}x{height}x{channels}"
