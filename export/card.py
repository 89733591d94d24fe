"""The model card of a published generator: how it was made, what it scored, and the command behind every number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from uni_instruct.bundle import WEIGHTS, Bundle
from uni_instruct.engines.record import EngineRecord
from uni_instruct.evaluate.result import EvaluationResult
from uni_instruct.hub import LICENCE_TAGS

_CARD = """---
library_name: uni-instruct
pipeline_tag: unconditional-image-generation
license: {licence_tag}
tags: [one-step, diffusion-distillation]
---
# {name}

A one-step image generator: images of {size}, one evaluation of a network of {parameters:.2f} million parameters each.{classes}

![samples](samples.png)

```
{sheet_command}
```

## Use
```
uni-instruct generate . --seeds 0-63 --out images/
uni-instruct serve .
```

## Scores
{scores}

## Weights and engine
{rounding} The engine `{engine}` agrees with torch on {images} images of fresh seeds within relative L2 {relative_l2:.1e}, in
{equal_pixels:.3%} of pixels exactly; {invariance}. Median latency on {machine}: {latency}.

```
uni-instruct export . --to {runtime}
uni-instruct inspect .
```

## Training
{training}
Licence: {licence}.
"""

_TRAINING = """Data: {data}. Trained with seed {seed} by the recipe `{recipe}`, in full below{note}:
{commands}
<details><summary>recipe.yaml</summary>

```yaml
{yaml}```
</details>
"""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What half precision changes, in uint8 levels, over `images` images of seeds 0, 1, ...

    precision: what is stored, 'fp16' or 'fp32'. too_large: the name of weights that half precision cannot hold, or ''. If there
    are such weights, no images were compared.
    """

    images: int
    largest_difference: int
    changed_pixels: float
    precision: str
    too_large: str = ""


def published_card(
    bundle: Bundle,
    rounding: Rounding | None,
    record: EngineRecord,
    scores: Sequence[EvaluationResult],
    sheet_command: str,
) -> str:
    """The text of README.md of a published bundle, with a header that Hugging Face reads.

    rounding: what half precision changes; None if that was not recorded. scores: one for each file of `evaluate --json`.
    sheet_command: the command that makes samples.png.
    """
    spec, parity = bundle.spec, record.parity
    channels, height, width = spec.image_shape
    names = ", ".join(spec.class_names)
    return _CARD.format(
        licence_tag=LICENCE_TAGS.get(spec.licence, "other"),
        name=spec.name,
        size=f"{width}x{height}x{channels}",
        parameters=sum(array.size for name, array in bundle.weights().items() if not name.endswith("resample_filter")) / 1e6,
        classes=f" {spec.num_classes} classes{f': {names}' if names else ''}." if spec.num_classes else "",
        sheet_command=sheet_command,
        scores=_scores(scores, bundle.weights_sha256),
        rounding=_rounding(rounding, spec.num_classes) if rounding else f"`{WEIGHTS}` holds {bundle.stored_precision()}.",
        engine=record.file,
        runtime=record.id.runtime,
        invariance=f"its images {'do not depend' if parity['batch_invariant'] else 'depend'} on the batch size",
        latency=", ".join(f"{ms:.1f} ms for {n} image{'s' if int(n) > 1 else ''}" for n, ms in parity["latency_ms"].items()),
        training=_training(spec.provenance),
        licence=spec.licence,
        **{key: parity[key] for key in ("images", "relative_l2", "equal_pixels", "machine")},
    )


def teacher_weights(rounding: Rounding) -> str:
    """The section on weights in the card of a published teacher."""
    if rounding.too_large:
        return f"## Weights\n{_too_large(rounding)}\n"
    return (
        f"## Weights\n`{WEIGHTS}` stores matrices in half precision. Sampled with the trained weights, in float32, "
        f"{rounding.changed_pixels:.2%} of the pixels of seeds 0-{rounding.images - 1} differ, by up to "
        f"{rounding.largest_difference} levels (`uni-instruct publish`).\n"
    )


def _rounding(rounding: Rounding, num_classes: int) -> str:
    if rounding.too_large:
        return _too_large(rounding)
    classes = f", class = seed mod {num_classes}" if num_classes else ""
    if rounding.images < num_classes:
        classes = f", of as many of the {num_classes} classes, evenly spaced; no weight of any class is too large for it"
    seeds = f"seeds 0-{rounding.images - 1}{classes}"
    if rounding.precision == "fp16":
        return (
            f"`{WEIGHTS}` stores matrices in half precision, which against the trained float32 weights changes "
            f"{rounding.changed_pixels:.2%} of pixels by 1 level and none by more ({rounding.images} images, {seeds}; "
            "`uni-instruct publish`)."
        )
    return (
        f"`{WEIGHTS}` holds float32: half precision would change a pixel by {rounding.largest_difference} levels "
        f"({rounding.images} images, {seeds}; `uni-instruct publish`)."
    )


def _too_large(rounding: Rounding) -> str:
    return f"`{WEIGHTS}` holds float32: half precision cannot hold the largest numbers of `{rounding.too_large}`."


def _scores(scores: Sequence[EvaluationResult], weights_sha256: str) -> str:
    """The table of scores, and the commands that measure them, in Markdown.

    The table has a row per metric and a column per set of seeds. If there are several sets, mean and spread come first.
    """
    if not scores:
        return "No scores were measured; `uni-instruct evaluate . --reference DATA` measures them."
    columns = [column for facts in scores for column in _columns(facts)]
    names = dict.fromkeys(name for _, cells in columns for name in cells)
    heads = [head for head, _ in columns]
    rows = [(name, *(cells.get(name, "") for _, cells in columns)) for name in names]
    lines = [["", *heads], ["---"] * (len(heads) + 1), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    commands = "\n".join(dict.fromkeys(_command(facts) for facts in scores))
    before = any(facts["scores"]["generator"]["weights_sha256"] != weights_sha256 for facts in scores)
    note = "\n\nMeasured on the float32 weights, before they were rounded." if before else ""
    return f"{table}\n\n```\n{commands}\n```\n\n{_extractors(scores)}{note}".rstrip()


def _columns(facts: EvaluationResult) -> list[tuple[str, dict[str, str]]]:
    """The columns of one evaluation, each a heading and values by metric: mean and spread of several sets, then each set."""
    roles, seeds = facts["scores"], facts["seeds"]
    main = {}
    for role, score in roles.items():
        for name, value in score["values"].items():
            spread = f" ± {score['spread'][name]:.2g}" if "spread" in score else ""
            main[_row(role, name)] = f"{value:.4g}{spread}"
    sets = [score.get("by_set", []) for score in roles.values()]
    columns = [(f"mean ± spread of {len(sets[0])} sets" if sets[0] else f"seeds {seeds}", main)]
    for number, of_roles in enumerate(zip(*sets, strict=True)):
        cells = {
            _row(role, name): f"{value:.4g}"
            for role, of_set in zip(roles, of_roles, strict=True)
            for name, value in of_set.items()
        }
        columns.append((f"seeds {_seeds_of_set(str(seeds), number, len(sets[0]))}", cells))
    return columns


def _row(role: str, metric: str) -> str:
    return metric if role == "generator" else f"{role}: {metric}"


def _seeds_of_set(seeds: str, number: int, sets: int) -> str:
    """The seeds of one of several sets: of '0-14999', '5000-9999' for the second of three. 'of set 2' if seeds are no range."""
    first, dash, last = seeds.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        return f"of set {number + 1}"
    size = (int(last) - int(first) + 1) // sets
    return f"{int(first) + number * size}-{int(first) + (number + 1) * size - 1}"


def _extractors(scores: Sequence[EvaluationResult]) -> str:
    """Text that names the feature extractors used: scores compare only if they are of the same extractor."""
    found = {(facts.get("extractor") or {}).get("sha256"): facts for facts in scores}
    texts = [
        f"Features: {facts['extractor'].get('name')}, sha256 {digest[:16]}. Scores can be compared if this hash is the same. "
        "The classifiers for shipped generators come with the package; others are trained when they are needed."
        for digest, facts in found.items()
        if digest
    ]
    return "\n".join(texts)


def _command(facts: EvaluationResult) -> str:
    generator = facts["scores"]["generator"]
    # The default extractor may be another one: for colour images it is InceptionV3.
    judged = any("-classifier)" in name for name in generator["values"])
    options = {
        "--sets": facts.get("sets", 1) if facts.get("sets", 1) > 1 else None,
        "--classes": facts.get("classes"),
        "--extractor": "classifier" if judged else None,
        "--engine": generator.get("engine"),
        "--teacher": "RUN/teacher" if "teacher" in facts["scores"] else None,
    }
    words = "".join(f" {name} {value}" for name, value in options.items() if value is not None)
    return f"uni-instruct evaluate . --reference {facts['reference']['name']} --seeds {facts['seeds']}{words}"


def _training(provenance: Mapping[str, object]) -> str:
    recipe = provenance.get("recipe")
    if not isinstance(recipe, Mapping):
        origin = yaml.safe_dump({key: value for key, value in provenance.items() if key != "published"}, sort_keys=False)
        return f"```yaml\n{origin}```\n"
    # Recipes without a section `objective` are of an earlier version, and can no longer be read.
    commands = f"\n```\nuni-instruct train recipe.yaml --out RUN\nuni-instruct publish RUN --out {recipe.get('name')}\n```\n"
    outdated = "objective" not in recipe
    note = provenance.get("note") or ("in an earlier version's format, which can no longer be read" if outdated else "")
    return _TRAINING.format(
        commands="" if outdated else commands,
        note=f" ({note})" if note else "",
        data=provenance.get("data") or "none, from its teacher alone",
        seed=recipe.get("loop", {}).get("seed", "unknown"),
        recipe=recipe.get("name", "recipe"),
        yaml=yaml.safe_dump(dict(recipe), sort_keys=False, width=120),
    )
