"""A divergence from a user's own f: an importable function or an expression in r. f is checked before it is used."""

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uni_instruct.errors import RequestError
from uni_instruct.train.objective.divergences.table import Divergence, Elementwise
from uni_instruct.train.objective.user_functions import import_named, is_importable_name

# The ratios at which f is checked: 1e-3 to 1e3. With the default logit clamp of 5, exp(logit) is in 0.007..148.
_CHECKED = torch.logspace(-3, 3, 241, dtype=torch.float64)
FINITE = "give an f that is finite for r in 1e-3..1e3"
MAX_EXPRESSION_LENGTH = 500  # characters; keeps the syntax tree shallow enough for recursion
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS = {"log": torch.log, "exp": torch.exp, "sqrt": torch.sqrt, "tanh": torch.tanh, "abs": torch.abs}


def is_custom(text: str) -> bool:
    """Whether the text can be a user's f: an importable name, or an expression in r with an operator or a call."""
    return is_importable_name(text) or (any(sign in text for sign in "+-*/(") and "r" in _names(text))


def read_divergence(text: str) -> Divergence:
    """The divergence of the f that the text names or spells out.

    Raises RequestError unless f(1) = 0 and f is finite, convex and curved somewhere for r in 1e-3..1e3.
    """
    f = import_named(text, param="divergence") if is_importable_name(text) else _expression(text)
    _check(text, f)
    return divergence_of(f, name=text)


# h = r^2 f''(r), and h', h''. These take four derivatives of f, which single precision would lose to rounding.
def divergence_of(f: Elementwise, name: str) -> Divergence:
    """The divergence of f, with h = r^2 f'' and its derivatives by automatic differentiation in double precision."""

    def h(r: Tensor) -> Tensor:
        return r**2 * _derivative(_derivative(f))(r)

    sample = _CHECKED.clone()
    constant = bool((_derivative(h)(sample).abs() < 1e-9).all())
    return Divergence(
        name=name,
        f=f,
        h=_double(h),
        dh=_double(_derivative(h)),
        d2h=_double(_derivative(_derivative(h))),
        needs_ratio=not constant,
    )


def _check(text: str, f: Elementwise) -> None:
    try:
        value = float(f(torch.ones(1, dtype=torch.float64)))
        second_derivative = _derivative(_derivative(f))(_CHECKED.clone()).detach()
    except Exception as error:  # the user's own code may raise anything
        reason = " ".join(str(error).split())
        raise _refused(text, f"cannot be differentiated twice: {reason}", "write it with torch operations on r") from error
    # `not abs(value) < 1e-6` also refuses a NaN; `abs(value) >= 1e-6` would not.
    if not abs(value) < 1e-6:
        raise _refused(text, f"is {value:.4g} at r = 1", "subtract that value from f, so that f(1) = 0")
    if not torch.isfinite(second_derivative).all():
        where = float(_CHECKED[~torch.isfinite(second_derivative)][0])
        raise _refused(text, f"has a second derivative that is not finite at r = {where:.3g}", FINITE)
    bad = second_derivative < -1e-9
    if bad.any():
        where, second = float(_CHECKED[bad][0]), float(second_derivative[bad][0])
        raise _refused(text, f"is not convex: its second derivative at r = {where:.3g} is {second:.3g}", "give a convex f")
    if not (second_derivative > 0).any():
        problem = "has no curvature (f'' = 0), so its weight h = r^2 f'' is zero and it trains nothing"
        raise _refused(text, problem, "give a strictly convex f")


def _refused(text: str, problem: str, remedy: str) -> RequestError:
    return RequestError(f"divergence f(r) = {text} {problem}", remedy=remedy, param="divergence")


def _derivative(f: Elementwise) -> Elementwise:
    def derivative(r: Tensor) -> Tensor:
        # The caller may have switched gradients off, but derivatives of f need them.
        with torch.enable_grad():
            r = r if r.requires_grad else r.detach().requires_grad_()
            value = f(r)
            if not value.requires_grad:  # f does not depend on r
                return torch.zeros_like(r)
            (slope,) = torch.autograd.grad(value.sum(), r, create_graph=True, materialize_grads=True)
        return slope

    return derivative


def _double(f: Elementwise) -> Elementwise:
    return lambda r: f(r.detach().double()).detach().to(r.dtype)


def _names(text: str) -> set[str]:
    if len(text) > MAX_EXPRESSION_LENGTH:
        return set()
    try:
        return {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
    except SyntaxError:
        return set()


def _expression(text: str) -> Elementwise:
    """The function of r that the expression describes. The expression is parsed and interpreted, never run as Python code."""
    tree = ast.parse(text, mode="eval").body
    try:
        _value(tree, torch.ones(1, dtype=torch.float64), text)
    except ArithmeticError as error:
        raise _refused(text, f"cannot be computed: {error}", FINITE) from error
    return lambda r: _value(tree, r, text)


def _value(node: ast.expr, r: Tensor, text: str) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id="r"):
            return r
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, r, text))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, r, text), _value(right, r, text))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](torch.as_tensor(_value(argument, r, text), dtype=r.dtype))
    known = ", ".join(_FUNCTIONS)
    raise _refused(text, f"contains '{ast.unparse(node)}', which is not supported", f"use r, numbers, + - * / ** and {known}")
