"""`uni-instruct train`."""

import json
import time
from pathlib import Path

import rich_click as click
import yaml

from uni_instruct.train.config import Recipe, load_recipe


@click.command()
@click.argument("recipe")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one line of the recipe; repeatable.")
@click.option("--dry-run", is_flag=True, help="Check recipe, data and teacher, print what would be trained, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(recipe: str, out: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Train a teacher and distil it into a one-step generator.

    RECIPE is the name of a built-in recipe or a YAML file. Run the same command again to resume. The run folder holds
    recipe.yaml, log.jsonl, TensorBoard events, samples/, state/, and the bundles teacher/ and generator/.

    Example: uni-instruct train digits --out runs/digits --set divergence=forward-kl
    """
    resolved = load_recipe(recipe, overrides)
    if dry_run:
        _explain(resolved, as_json)
        return
    from uni_instruct.train.pipeline import train as train_run

    start = time.monotonic()
    bundle = train_run(resolved, out)
    answer = {"bundle": str(bundle.path), "weights_sha256": bundle.weights_sha256, "time_s": time.monotonic() - start}
    if as_json:
        click.echo(json.dumps(answer))
    else:
        click.echo(f"generator: {bundle.path} ({answer['time_s']:.0f} s)")
        click.echo(f"next: uni-instruct generate {bundle.path} --seeds 0-63 --out {out}/images --grid {out}/grid.png")


def _explain(recipe: Recipe, as_json: bool) -> None:
    from uni_instruct.data import open_dataset
    from uni_instruct.networks.build import build_denoiser
    from uni_instruct.train.pipeline import plan_teacher

    dataset = open_dataset(recipe.data)
    network = build_denoiser(plan_teacher(recipe, dataset))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if as_json:
        click.echo(json.dumps({"recipe": recipe.to_dict(), "images": len(dataset), "parameters": parameters}))
        return
    click.echo(yaml.safe_dump(recipe.to_dict(), sort_keys=False).rstrip())
    click.echo(f"# {len(dataset)} images of {list(dataset.image_shape)}; {parameters / 1e6:.2f} M parameters a network")
