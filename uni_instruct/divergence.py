"""f-divergences D_f(q || p) = E_p[f(r)], r = q / p, and the weight h(r) = r^2 f''(r) that their expansion needs.

Source: theorems 3.1 and 3.2 of arXiv 2505.20755; docs/objective.md derives what is used. Functions take and give tensors of
ratios r > 0, elementwise; they are written with operators only, so that importing them needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uni_instruct.errors import RequestError

Elementwise = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One row of the table: f, and h with its first two derivatives in r."""

    name: str
    f: Elementwise
    h: Elementwise
    dh: Elementwise
    d2h: Elementwise

    @property
    def needs_ratio(self) -> bool:
        """Whether training needs a density ratio, and so real data: not where h is constant (reverse KL)."""
        return self.name != "reverse-kl"


# Adding a divergence is adding a row; tests/test_divergence.py checks each against f by automatic differentiation.
DIVERGENCES = {
    d.name: d
    for d in (
        Divergence(
            name="reverse-kl",
            f=lambda r: -r.log(),
            h=lambda r: r**0,
            dh=lambda r: 0 * r,
            d2h=lambda r: 0 * r,
        ),
        Divergence(
            name="forward-kl",
            f=lambda r: r * r.log(),
            h=lambda r: r,
            dh=lambda r: r**0,
            d2h=lambda r: 0 * r,
        ),
        Divergence(
            name="jeffreys",
            f=lambda r: (r - 1) * r.log(),
            h=lambda r: r + 1,
            dh=lambda r: r**0,
            d2h=lambda r: 0 * r,
        ),
        Divergence(
            name="jensen-shannon",
            f=lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
            h=lambda r: r / (r + 1),
            dh=lambda r: (r + 1) ** -2,
            d2h=lambda r: -2 * (r + 1) ** -3,
        ),
        Divergence(
            name="chi-square",
            f=lambda r: (r - 1) ** 2,
            h=lambda r: 2 * r**2,
            dh=lambda r: 4 * r,
            d2h=lambda r: 4 * r**0,
        ),
        Divergence(
            name="squared-hellinger",
            f=lambda r: 2 * (r**0.5 - 1) ** 2,
            h=lambda r: r**0.5,
            dh=lambda r: r**-0.5 / 2,
            d2h=lambda r: -(r**-1.5) / 4,
        ),
    )
}


def find_divergence(name: str) -> Divergence:
    """The divergence of that name. Raises RequestError for an unknown one."""
    if name not in DIVERGENCES:
        raise RequestError(
            f"divergence '{name}' is unknown", remedy=f"choose one of {', '.join(DIVERGENCES)}", param="divergence"
        )
    return DIVERGENCES[name]
