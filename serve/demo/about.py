"""GET /v1/about: what the demo's page shows of a model in addition to /v1/spec, mainly its model card."""

import re

from uni_instruct.bundle import CARD, SAMPLES, Bundle
from uni_instruct.serve.demo.compare import choices, find_teacher
from uni_instruct.serve.models.served_model import ServedModel
from uni_instruct.serve.routes.model_info import model_info
from uni_instruct.spec import evaluations

# An optional file of a bundle: samples in a row, each above its nearest training images.
NEIGHBOURS = "neighbours.png"
PICTURES = (SAMPLES, NEIGHBOURS)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_MAX_CARD_LENGTH = 100_000


def about(served: ServedModel) -> dict[str, object]:
    """Return model_info plus the card's Markdown, its pictures, the choices of /v1/compare, the teacher and `needs_key`.

    Reads files, so call it in a thread. Raises NotReadyError until the generator is loaded.
    """
    bundle = served.bundle
    return {
        **model_info(served),
        "card": card(bundle),
        "pictures": [name for name in PICTURES if (bundle.path / name).is_file()],
        "compare": choices(bundle, str(served.engine.id)),
        "teacher": teacher_facts(bundle),
        "needs_key": bool(served.settings.keys),
    }


def card(bundle: Bundle) -> str:
    """Return the model card's Markdown without its YAML front matter; empty if the bundle has no card."""
    path = bundle.path / CARD
    if not path.is_file():
        return ""
    return _FRONT_MATTER.sub("", path.read_text(encoding="utf-8", errors="replace")[:_MAX_CARD_LENGTH])


def teacher_facts(bundle: Bundle) -> dict[str, object] | None:
    """Return the teacher's steps, its network evaluations per image, and whether its bundle is available (`at_hand`).

    The steps come from that bundle, otherwise from the training recipe in the spec. None if neither has them.
    """
    at_hand = find_teacher(bundle)
    recipe = bundle.spec.provenance.get("recipe")
    stage = recipe.get("teacher") if isinstance(recipe, dict) else None
    steps = at_hand.spec.steps if at_hand else stage.get("steps") if isinstance(stage, dict) else None
    if not isinstance(steps, int) or steps < 1:
        return None
    return {"steps": steps, "evaluations": evaluations(steps), "at_hand": at_hand is not None}
