"""Look up a divergence by name: a row of the table, or a user's own f."""

from uni_instruct.errors import RequestError
from uni_instruct.train.objective.divergences.custom import is_custom, read_divergence
from uni_instruct.train.objective.divergences.table import (
    DEFAULT_MIX,
    DEFAULT_ORDER,
    DIVERGENCES,
    Divergence,
    alpha_divergence,
    jeffreys,
)


def find_divergence(name: str, *, order: float = DEFAULT_ORDER, mix: float = DEFAULT_MIX) -> Divergence:
    """The divergence of that name, or of a user's own f: 'module:function', 'file.py:function' or an expression in r.

    order is the alpha family's a, mix the share of the forward KL in Jeffreys' divergence. Raises RequestError for an unknown
    name, and for an f that is not convex or not 0 at r = 1.
    """
    # These two divergences have a parameter; their rows in the table have its default value.
    if name == "alpha":
        return alpha_divergence(order)
    if name == "jeffreys":
        return jeffreys(mix)
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    if is_custom(name):
        return read_divergence(name)
    raise RequestError(
        f"divergence '{name}' is unknown",
        remedy=f"choose one of {', '.join(DIVERGENCES)}, or give f as module:function or as an expression in r",
        param="divergence",
    )
