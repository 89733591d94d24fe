"""Every divergence: convex, zero at one, and h with its derivatives as automatic differentiation gives them; users' own too."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from uni_instruct.errors import RequestError
from uni_instruct.train.objective.divergences.find import find_divergence
from uni_instruct.train.objective.divergences.table import DIVERGENCES, Divergence, alpha_divergence, jeffreys

ORDERS = (-0.5, 0.0, 0.5, 1.0, 2.0)
MIXES = (0.0, 0.3, 1.0)
EVERY = {
    **DIVERGENCES,
    **{f"alpha {order}": alpha_divergence(order) for order in ORDERS},
    **{f"jeffreys {mix}": jeffreys(mix) for mix in MIXES},
}
# Each row of the table once more, as a user would write it.
EXPRESSIONS = {
    "reverse-kl": "-log(r)",
    "forward-kl": "r * log(r)",
    "jeffreys": "(r - 1) * log(r)",
    "jensen-shannon": "r*log(r) - (r + 1)*log((r + 1)/2)",
    "chi-square": "(r - 1)**2",
    "squared-hellinger": "2 * (sqrt(r) - 1)**2",
    "alpha": "2 + 2*r - 4*sqrt(r)",
    "softened-reverse-kl": "(r+1) * log((r+1) / (2*r))",
}
REFUSED = {
    "-r*log(r)": r"is not convex: its second derivative at r = 0.001 is -1e\+03; give a convex f",
    "(r-1)**3": "is not convex: its second derivative at r = 0.001 is -5.99",
    "r*log(r) + 1": "is 1 at r = 1; subtract that value from f, so that f",
    "2*r - 2": r"has no curvature \(f'' = 0\), so its weight h = r\^2 f'' is zero and it trains nothing; give a strictly",
    "abs(r - 1)": "has no curvature",
    "exp(r**2) - exp(1)": "has a second derivative that is not finite at r = 26.6; give an f that is finite for r in 1e-3..1e3",
    "r*log(r) + 1/0": "cannot be computed: float division by zero",
    "9**9**9 * r": "cannot be computed: ",
    "-" * 5000 + "r": "is unknown",
    "kl": "divergence 'kl' is unknown; choose one of reverse-kl, forward-kl",
    "r*log(r": "is unknown",
    "no_such_module:f": "cannot be imported: No module named 'no_such_module'",
    "no_such_file.py:f": "cannot be imported: there is no file no_such_file.py",
    "math:no_such_function": "math has no function no_such_function; correct the name",
}
# What an expression may not hold: each would do something if it were executed.
FORBIDDEN = {
    "__import__('pathlib').Path('executed').touch() or r": "__import__",
    "(open('executed', 'w') and r) * log(r)": "open",
    "(lambda: open('executed', 'w'))() + r": "lambda",
    "[open('executed', 'w') for _ in range(1)][0] * r": "open",
    "r.log() * r": r"r\.log\(\)",
    "r * log(r) if r.any() else r - 1": " if ",
    "x * log(r)": "x",
    "log(r, out=r) + r": "out=r",
    "max(r, 1) - 1": "max",
    "r @ r + r": "@",
}


@pytest.mark.parametrize("name", EVERY)
def test_row_follows_from_f(name: str) -> None:
    divergence = EVERY[name]
    r = torch.logspace(-2, 2, 81, dtype=torch.float64)
    second, h, dh, d2h = by_differentiation(divergence, r)
    assert (second > 0).all()
    for written, derived in ((divergence.h(r), h), (divergence.dh(r), dh), (divergence.d2h(r), d2h)):
        torch.testing.assert_close(written, derived, rtol=1e-9, atol=1e-9)
    one = torch.ones(1, dtype=torch.float64)
    assert divergence.f(one).item() == 0
    assert divergence.needs_ratio == bool((divergence.dh(r) != 0).any())


@pytest.mark.parametrize("name", EVERY)
def test_single_precision_is_enough_and_kept(name: str) -> None:
    """As training has it: float32 ratios as far as the clamped logit lets them go."""
    divergence = EVERY[name]
    r = torch.logspace(-2, 2, 81, dtype=torch.float64)
    for function in (divergence.h, divergence.dh, divergence.d2h):
        single = function(r.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), function(r), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("order", "name", "factor"), [(0, "reverse-kl", 1), (1, "forward-kl", 1), (2, "chi-square", 0.5)])
def test_members_of_the_alpha_family_have_names(order: float, name: str, factor: float) -> None:
    r = torch.logspace(-2, 2, 81, dtype=torch.float64)
    member, named = find_divergence("alpha", order=order), find_divergence(name)
    torch.testing.assert_close(member.f(r), factor * named.f(r))
    torch.testing.assert_close(member.h(r), factor * named.h(r))


def test_jeffreys_mixes_the_two_kullback_leibler_divergences() -> None:
    r = torch.logspace(-2, 2, 81, dtype=torch.float64)
    forward, reverse = find_divergence("forward-kl"), find_divergence("reverse-kl")
    for mix in (*MIXES, 0.5):
        mixed = find_divergence("jeffreys", mix=mix)
        torch.testing.assert_close(mixed.f(r), 2 * mix * forward.f(r) + 2 * (1 - mix) * reverse.f(r))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_equals_the_row_of_the_table(name: str, dtype: torch.dtype) -> None:
    row, own = DIVERGENCES[name], find_divergence(EXPRESSIONS[name])
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    r = torch.logspace(-2, 2, 81, dtype=dtype)
    for written, derived in ((row.h, own.h), (row.dh, own.dh), (row.d2h, own.d2h)):
        assert derived(r).dtype == dtype
        torch.testing.assert_close(derived(r), written(r), rtol=tolerance, atol=tolerance)
    assert own.needs_ratio == row.needs_ratio


def test_a_function_in_a_file_is_a_divergence(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\ndef hellinger(r):\n    return 2 * (torch.sqrt(r) - 1) ** 2\n")
    own, row = find_divergence(f"{file}:hellinger"), DIVERGENCES["squared-hellinger"]
    r = torch.logspace(-2, 2, 81, dtype=torch.float64)
    for written, derived in ((row.f, own.f), (row.h, own.h), (row.dh, own.dh), (row.d2h, own.d2h)):
        torch.testing.assert_close(derived(r), written(r), rtol=1e-9, atol=1e-9)
    assert not own.h(r.requires_grad_()).requires_grad


def test_a_function_that_fails_is_refused_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import torch\n\ndef numpy_only(r):\n    return torch.from_numpy(r.numpy() ** 2 - 1)\n")
    with pytest.raises(RequestError, match=r"cannot be differentiated twice: .*; write it with torch operations on r"):
        find_divergence(f"{file}:numpy_only")


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_divergence_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=REFUSED[text]) as caught:
        find_divergence(text)
    assert caught.value.param == "divergence"


@pytest.mark.parametrize("text", FORBIDDEN)
def test_expressions_are_read_and_never_executed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=rf"contains '.*{FORBIDDEN[text]}.*', which is not supported; use r, numbers"):
        find_divergence(text)
    assert not list(tmp_path.iterdir())


def by_differentiation(divergence: Divergence, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f'', h = r^2 f'', h' and h'' at r."""
    r = r.clone().requires_grad_()

    def slope(values: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(values.sum(), r, create_graph=True, materialize_grads=True)
        return found

    second = slope(slope(divergence.f(r)))
    h = r**2 * second
    dh = slope(h)
    return second.detach(), h.detach(), dh.detach(), slope(dh).detach()
