"""Every row of the table: convex, zero at one, and h with its derivatives as automatic differentiation gives them."""

import pytest
import torch

from uni_instruct.divergence import DIVERGENCES, Divergence, find_divergence
from uni_instruct.errors import RequestError


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=lambda d: d.name)
def test_row_follows_from_f(divergence: Divergence) -> None:
    r = torch.logspace(-2, 2, 81, dtype=torch.float64).requires_grad_()
    first = torch.autograd.grad(divergence.f(r).sum(), r, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), r, create_graph=True)[0]
    h = r**2 * second
    dh = torch.autograd.grad(h.sum(), r, create_graph=True)[0]
    d2h = torch.autograd.grad(dh.sum(), r, create_graph=True)[0]
    assert (second > 0).all()
    for written, derived in ((divergence.h(r), h), (divergence.dh(r), dh), (divergence.d2h(r), d2h)):
        torch.testing.assert_close(written, derived, rtol=1e-9, atol=1e-9)
    one = torch.ones(1, dtype=torch.float64)
    assert divergence.f(one).item() == 0
    assert divergence.needs_ratio == bool((divergence.dh(r) != 0).any())


def test_unknown_divergence_is_refused_with_the_names() -> None:
    with pytest.raises(RequestError, match="divergence 'kl' is unknown; choose one of reverse-kl, forward-kl"):
        find_divergence("kl")
