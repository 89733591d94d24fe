"""The model card of a bundle: what the model is, its training data, its scores, and how to use it."""

from collections.abc import Mapping

from uni_instruct.card_usage import usage
from uni_instruct.data import Dataset
from uni_instruct.hub import LICENCE_TAGS
from uni_instruct.spec import ModelSpec
from uni_instruct.train.config import Recipe

_CARD = """---
library_name: uni-instruct
pipeline_tag: unconditional-image-generation
license: {licence_tag}
tags: [one-step, diffusion-distillation]
---
# {name}

{summary} Trained by the recipe `{recipe}` {data} ({what} of {size}{classes}).

![samples](samples.png)

## Scores of the weights that were kept
{scores}

Measured during training on {samples} seeds reserved for choosing the weights; `uni-instruct evaluate` measures on others.

## Use
```
{usage}
```

Data: {source}. Licence of data: {licence}.
"""


def model_card(spec: ModelSpec, recipe: Recipe, dataset: Dataset | None, scores: Mapping[str, float]) -> str:
    """The text of a bundle's README.md, with the metadata header that Hugging Face reads. scores: of the weights kept."""
    channels, height, width = spec.image_shape
    # Teachers and generators use the same template; the number of steps tells them apart.
    one_step = spec.steps == 1
    summary = (
        f"A one-step image generator, distilled by {recipe.objective.method} ({recipe.objective.family} family, "
        f"{recipe.objective.divergence})."
        if one_step
        else f"A diffusion teacher, sampled with {spec.steps} steps of EDM's Heun sampler."
    )
    return _CARD.format(
        name=spec.name,
        # The hub rejects unknown licence tags.
        licence_tag=LICENCE_TAGS.get(spec.licence, "other"),
        summary=summary,
        recipe=recipe.name,
        data=f"on {len(dataset)} images of {dataset.name}" if dataset else "from its teacher alone",
        what="images" if spec.makes_pictures else "a VAE's latents",
        size=f"{width}x{height}x{channels}",
        classes=f", {spec.num_classes} classes" if spec.num_classes else "",
        scores="\n".join(f"- {name}: {value:.4g}" for name, value in scores.items()) or "- none",
        samples=recipe.loop.samples,
        usage=usage(spec),
        source=dataset.source if dataset else "none, a teacher alone",
        licence=spec.licence,
    )
