"""uni-instruct card: rewrite the model card of a published generator, with new scores."""

from pathlib import Path

import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.commands.evaluate import MAX_SAMPLES
from uni_instruct.commands.scoring import Scoring, score_bundles
from uni_instruct.commands.worker_options import ray_option, worker_options_of, workers_option
from uni_instruct.evaluate import EXTRACTORS, PRETRAINED
from uni_instruct.evaluate.result import EvaluationResult
from uni_instruct.evaluate.scores import MIN_SAMPLES
from uni_instruct.export.publish import ENGINE, read_scores, rewrite_card


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--reference", help="Data set that the generator is scored against, for the card.")
@click.option(
    "--samples", type=click.IntRange(MIN_SAMPLES, MAX_SAMPLES), help="Images per set. [default: as many as the reference has]"
)
@click.option("--sets", type=click.IntRange(1, 100), default=3, help="Disjoint sets of seeds, for mean and spread.")
@click.option(
    "--extractor", type=click.Choice([*EXTRACTORS, *PRETRAINED]), default="auto", help="What turns images into features."
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="File with the output of an earlier 'evaluate --json', in addition to or instead of --reference; repeatable.",
)
@workers_option
@ray_option
def card(
    folder: Path,
    reference: str | None,
    samples: int | None,
    sets: int,
    extractor: str,
    scores: tuple[Path, ...],
    workers: int | None,
    ray_address: str | None,
) -> None:
    """Rewrite the model card of a published BUNDLE: score it, and list every score with the command that measures it.

    The bundle is scored with the engine that ships with it. Its weights and its engine do not change.

    Example: uni-instruct card published/emoji --reference emoji --extractor classifier --samples 5000
    """
    options, read = worker_options_of(workers, ray_address, None), [read_scores(path) for path in scores]
    measured: list[EvaluationResult] = []
    if reference is not None:
        scoring = Scoring(
            reference=reference, sets=sets, samples=samples, extractor=extractor, engine=ENGINE, workers=options, device="cpu"
        )
        measured = score_bundles([Bundle.open(folder)], scoring, None)
    click.echo(f"card: {rewrite_card(folder, [*measured, *read])}")
