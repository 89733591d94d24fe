"""f-divergences D_f(q || p) = E_p[f(r)], r = q / p, and the weight h(r) = r^2 f''(r) that their expansion needs.

Source: theorems 3.1 and 3.2 of arXiv 2505.20755; docs/objective.md has the derivation. The functions work elementwise on
tensors of ratios r > 0. They use operators and tensor methods only, so that importing this module needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Elementwise = Callable[[Any], Any]

DEFAULT_ORDER = 0.5
DEFAULT_MIX = 0.5


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """One row of the table: f, and the weight h with its first two derivatives in r.

    needs_ratio: whether training needs a density ratio, and therefore real data. False if h is constant (reverse KL).
    """

    name: str
    f: Elementwise
    h: Elementwise
    dh: Elementwise
    d2h: Elementwise
    needs_ratio: bool = True


def alpha_divergence(order: float) -> Divergence:
    """The alpha family, h = r^a: a = 0 is reverse KL, 1/2 squared Hellinger (twice), 1 forward KL, 2 half of chi-square."""
    # f(r) = (r^a - a r - (1 - a)) / (a (a - 1)), h = r^2 f'' = r^a. The limits at a = 0 and a = 1 are the two KLs.
    a = order
    if a == 0:
        f = DIVERGENCES["reverse-kl"].f
    elif a == 1:
        f = DIVERGENCES["forward-kl"].f
    else:
        f = lambda r: (r**a - a * r - (1 - a)) / (a * (a - 1))  # noqa: E731
    return Divergence(
        name="alpha",
        f=f,
        h=lambda r: r**a,
        dh=lambda r: a * r ** (a - 1),
        d2h=lambda r: a * (a - 1) * r ** (a - 2),
        needs_ratio=a != 0,
    )


def jeffreys(mix: float) -> Divergence:
    """2 (mix KL(q||p) + (1 - mix) KL(p||q)): Jeffreys' divergence at 1/2, forward KL alone (twice) at 1."""
    # f(r) = 2 m r log r - 2 (1 - m) log r, h = 2 m r + 2 (1 - m). The factor 2 makes m = 1/2 Jeffreys' sum of both KLs.
    forward, reverse = 2 * mix, 2 * (1 - mix)
    return Divergence(
        name="jeffreys",
        f=lambda r: (forward * r - reverse) * r.log(),
        h=lambda r: forward * r + reverse,
        dh=lambda r: forward * r**0,
        d2h=lambda r: 0 * r,
        needs_ratio=mix != 0,
    )


# To add a divergence, add a row. test_divergence.py checks each row against automatic differentiation of its f.
DIVERGENCES = {
    d.name: d
    for d in (
        Divergence(
            name="reverse-kl",
            f=lambda r: -r.log(),
            h=lambda r: r**0,
            dh=lambda r: 0 * r,
            d2h=lambda r: 0 * r,
            needs_ratio=False,
        ),
        Divergence(
            name="forward-kl",
            f=lambda r: r * r.log(),
            h=lambda r: r,
            dh=lambda r: r**0,
            d2h=lambda r: 0 * r,
        ),
        jeffreys(DEFAULT_MIX),
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
        alpha_divergence(DEFAULT_ORDER),
        Divergence(  # arXiv 2502.15681, table 1
            name="softened-reverse-kl",
            f=lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
            h=lambda r: 1 / (r + 1),
            dh=lambda r: -((r + 1) ** -2),
            d2h=lambda r: 2 * (r + 1) ** -3,
        ),
    )
}
