"""uni-instruct import."""

import json
from pathlib import Path

import rich_click as click

from uni_instruct.hub import fetch, is_on_hub
from uni_instruct.spec import DEFAULT_SIGMA_INIT, TEACHER_STEPS


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("checkpoint")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the bundle; replaced if there.")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["generator", "teacher"]),
    help="One step, or many.  [default: teacher where the file names a denoiser's loss]",
)
@click.option("--network", help="Which network of a training state.  [default: the generator's average]")
@click.option("--name", help="Name of the bundle.  [default: the file's]")
@click.option(
    "--sigma-init", default=DEFAULT_SIGMA_INIT, type=click.FloatRange(1e-3, 1e4), help="Noise level of a generator's input."
)
@click.option("--steps", default=TEACHER_STEPS, type=click.IntRange(2, 1000), help="Steps of a teacher's sampler.")
@click.option(
    "--patch",
    type=int,
    help="Side of the squares of pixels that the network sees as one: 1, 2 or 4.  [default: what the config.json of a bundle "
    "beside the file says, else 1]",
)
@click.option("--licence", help="Licence of the weights.  [default: NVIDIA's for what derives from EDM, else unknown]")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def import_checkpoint(
    checkpoint: str,
    out: Path,
    kind: str | None,
    network: str | None,
    name: str | None,
    sigma_init: float,
    steps: int,
    patch: int | None,
    licence: str | None,
    as_json: bool,
) -> None:
    """Make a bundle of CHECKPOINT: a file of EDM, EDM2, SiD, SiDA or Uni-Instruct, a state dict, or hf://owner/name/file.

    Nothing in the file is ever run. Every weight must be found and fit, or nothing is written. docs/checkpoints.md has the
    formats; `uni-instruct inspect` shows what a file holds.

    Example: uni-instruct import cifar10-sid.pkl --out bundles/cifar10
    """
    from uni_instruct.checkpoints.import_bundle import ImportRequest
    from uni_instruct.checkpoints.import_bundle import import_checkpoint as run

    path, origin = Path(checkpoint), ""
    if is_on_hub(checkpoint):
        download = fetch(checkpoint)
        path, origin = download.path, download.origin
    request = ImportRequest(
        kind=kind,
        network=network,
        name=name,
        sigma_init=sigma_init,
        steps=steps,
        licence=licence,
        origin=origin,
        patch=patch,
    )
    bundle = run(path, out, request)
    made = "teacher" if bundle.spec.steps > 1 else "generator"
    if as_json:
        answer = {"bundle": str(out), "kind": made, "weights_sha256": bundle.weights_sha256, "network": bundle.spec.network}
        click.echo(json.dumps(answer | {"provenance": dict(bundle.spec.provenance)}))
        return
    other = {"teacher": "generator", "generator": "teacher"}[made]
    guess = "" if kind else f" (taken for one; --as {other} if it is not)"
    spec = bundle.spec
    click.echo(f"{made}{guess}: {out}, {spec.network} of {_size(spec.image_shape)}, licence {spec.licence}")
    use = f"serve {out}" if made == "generator" else f"train RECIPE --set teacher={out} data=DATA.zip --out RUN"
    click.echo(f"next: uni-instruct {use}")


def _size(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{width}x{height}x{channels}"
