"""`uni-instruct average`: another average of a run's weights, without training again."""

import dataclasses
from pathlib import Path
from shlex import quote

import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.commands.option_types import FiniteRange
from uni_instruct.errors import RequestError
from uni_instruct.system.files import refuse_file_name
from uni_instruct.train.recipe_keys import MIN_AVERAGE_WIDTH, WIDEST_AVERAGE


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--std",
    required=True,
    type=FiniteRange(MIN_AVERAGE_WIDTH, WIDEST_AVERAGE),
    help="Width of the average, relative to training time; EDM2 uses 0.02 to 0.25.",
)
@click.option(
    "--kimg",
    type=FiniteRange(1e-3, 1e9),
    help="Training time at which to take the average, in thousands of images.  [default: the end]",
)
@click.option(
    "--stage", default="generator", type=click.Choice(["generator", "teacher"]), help="Stage whose weights are averaged."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle.")
def average(run: Path, std: float, kimg: float | None, stage: str, out: Path) -> None:
    """Make a bundle from an average of another width, reconstructed from the snapshots of a run.

    EDM2's post-hoc EMA (arXiv 2312.02696): training with distillation.ema_power_std=[0.05,0.1] keeps snapshots of two
    power-function averages. Averages of other widths are reconstructed from them. Evaluate several widths and keep the best.

    Example: uni-instruct average runs/digits --std 0.08 --out runs/digits-0.08
    """
    from uni_instruct.data import open_dataset
    from uni_instruct.engine import TORCH, open_engine
    from uni_instruct.generate import generate_images, resolve_class_ids
    from uni_instruct.images import contact_sheet, encode, latent_preview
    from uni_instruct.networks.reference import make_reference
    from uni_instruct.train.card import model_card
    from uni_instruct.train.optimization.posthoc import reconstruct
    from uni_instruct.train.recipe import parse_recipe, read_yaml

    # An existing folder is not replaced, because it may be the only copy of another width.
    if out.exists():
        raise RequestError(f"{out} exists already", remedy="give another folder as --out", param="out")
    refuse_file_name(out)
    trained = Bundle.open(run / stage)
    recipe = parse_recipe(read_yaml(run / "recipe.yaml"))
    weights = {name: tensor.numpy() for name, tensor in reconstruct(run / "snapshots" / stage, std, kimg).items()}
    # Recorded in the bundle, because training itself never had these weights.
    origin = {"average_std": std, "average_kimg": kimg, "averaged_run": trained.weights_sha256}
    spec = dataclasses.replace(trained.spec, provenance={**trained.spec.provenance, **origin})
    card = model_card(spec, recipe, open_dataset(recipe.data) if recipe.data else None, {})
    seeds = range(recipe.loop.grid)
    decoder = trained.decoder_weights()
    engine = open_engine(Bundle.write(out, spec, weights, card, decoder=decoder), TORCH)
    images = generate_images(engine, seeds, resolve_class_ids(spec, seeds))
    samples = encode(contact_sheet(images if spec.makes_pictures else latent_preview(images)))
    bundle = Bundle.write(out, spec, weights, card, samples, decoder=decoder, reference=make_reference)
    click.echo(f"{stage}: {bundle.path} (width {std:g} of training time, reconstructed)")
    click.echo(f"next: uni-instruct evaluate {quote(str(bundle.path))} --reference {quote(recipe.data or 'DATA')}")
