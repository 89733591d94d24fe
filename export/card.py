"""The model card of a published generator: how it was made, what it scored, and the command behind every number."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from uni_instruct.bundle import WEIGHTS, Bundle
from uni_instruct.engines.record import EngineRecord
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

_TRAINING = """Data: {data}. Trained with seed {seed} by the recipe `{recipe}`, in full below:

```
uni-instruct train recipe.yaml --out RUN
uni-instruct publish RUN --out {recipe}
```

<details><summary>recipe.yaml</summary>

```yaml
{yaml}```
</details>
"""


def published_card(
    bundle: Bundle,
    rounding: Mapping[str, Any],
    record: EngineRecord,
    scores: Sequence[Mapping[str, Any]],
    sheet_command: str,
) -> str:
    """README.md of a published bundle, with a header that Hugging Face reads.

    rounding: what half precision changes (`publish.Rounding`). scores: what `evaluate --json` printed, one a set of seeds.
    """
    spec, parity = bundle.spec, record.parity
    channels, height, width = spec.image_shape
    names = ", ".join(spec.class_names)
    return _CARD.format(
        licence_tag=LICENCE_TAGS.get(spec.licence, "other"),
        name=spec.name,
        size=f"{height}x{width}x{channels}",
        parameters=sum(array.size for name, array in bundle.weights().items() if not name.endswith("resample_filter")) / 1e6,
        classes=f" {spec.num_classes} classes{f': {names}' if names else ''}." if spec.num_classes else "",
        sheet_command=sheet_command,
        scores=_scores(scores, bundle.weights_sha256),
        rounding=_rounding(rounding, spec.num_classes),
        engine=record.file,
        runtime=record.id.runtime,
        invariance=f"{'the same' if parity['batch_invariant'] else 'not the same'} bytes whatever the batch",
        latency=", ".join(f"{ms:.1f} ms for {n} image{'s' if int(n) > 1 else ''}" for n, ms in parity["latency_ms"].items()),
        training=_training(spec.provenance),
        licence=spec.licence,
        **{key: parity[key] for key in ("images", "relative_l2", "equal_pixels", "machine")},
    )


def _rounding(rounding: Mapping[str, Any], num_classes: int) -> str:
    seeds = f"seeds 0-{rounding['images'] - 1}" + (f", class = seed mod {num_classes}" if num_classes else "")
    if rounding["precision"] == "fp16":
        return (
            f"`{WEIGHTS}` stores matrices in half precision, which against the trained float32 weights changes "
            f"{rounding['changed_pixels']:.2%} of pixels by 1 level and none by more ({rounding['images']} images, {seeds}; "
            "`uni-instruct publish`)."
        )
    return (
        f"`{WEIGHTS}` holds float32: half precision would change a pixel by {rounding['largest_difference']} levels "
        f"({rounding['images']} images, {seeds}; `uni-instruct publish`)."
    )


def _scores(scores: Sequence[Mapping[str, Any]], weights_sha256: str) -> str:
    """A column for each set of seeds, a row for each metric, and the commands."""
    if not scores:
        return "Nothing was measured; `uni-instruct evaluate . --reference DATA` does."
    rows: dict[str, list[str]] = {}
    for column, facts in enumerate(scores):
        for role, score in facts["scores"].items():
            for metric, value in score["values"].items():
                cells = rows.setdefault(metric if role == "generator" else f"{role}: {metric}", [""] * len(scores))
                spread = f" +- {score['spread'][metric]:.2g}" if "spread" in score else ""
                cells[column] = f"{value:.4g}{spread}"
    heads = [f"seeds {facts['seeds']}" for facts in scores]
    lines = [["", *heads], ["---"] * (len(heads) + 1), *([name, *cells] for name, cells in rows.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    commands = "\n".join(dict.fromkeys(_command(facts) for facts in scores))
    before = any(facts["scores"]["generator"]["weights_sha256"] != weights_sha256 for facts in scores)
    note = "\n\nMeasured on the float32 weights, before they were rounded." if before else ""
    return f"{table}\n\n```\n{commands}\n```{note}"


def _command(facts: Mapping[str, Any]) -> str:
    teacher = " --teacher RUN/teacher" if "teacher" in facts["scores"] else ""
    # Of colour, and so by default, InceptionV3 would be asked for features.
    judged = any("-classifier)" in name for name in facts["scores"]["generator"]["values"])
    extractor = " --extractor classifier" if judged else ""
    sets = f" --sets {facts['sets']}" if facts.get("sets", 1) > 1 else ""
    seeds = f"--seeds {facts['seeds']}{sets}"
    return f"uni-instruct evaluate . --reference {facts['reference']['name']} {seeds}{extractor}{teacher}"


def _training(provenance: Mapping[str, Any]) -> str:
    recipe = provenance.get("recipe")
    if not isinstance(recipe, Mapping):
        origin = yaml.safe_dump({key: value for key, value in provenance.items() if key != "published"}, sort_keys=False)
        return f"```yaml\n{origin}```\n"
    return _TRAINING.format(
        data=provenance.get("data") or "none, from its teacher alone",
        seed=recipe.get("loop", {}).get("seed", "unknown"),
        recipe=recipe.get("name", "recipe"),
        yaml=yaml.safe_dump(dict(recipe), sort_keys=False, width=120),
    )
