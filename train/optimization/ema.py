"""Averages of weights over training: exponential with a half-life (EDM), and with a power function (EDM2).

An average has no state other than its weights: beta of a step follows from the number of images seen, which the caller passes.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.train.recipe_keys import MIN_AVERAGE_WIDTH, WIDEST_AVERAGE

Averaged = TypeVar("Averaged", bound=nn.Module)


class Average(ABC, Generic[Averaged]):
    """An average of a module's weights. `module` is a copy that holds the average, for evaluation only."""

    name: str

    def __init__(self, module: Averaged):
        self.module: Averaged = copy.deepcopy(module).eval().requires_grad_(False)

    @abstractmethod
    def beta(self, batch: int, seen_kimg: float) -> float:
        """beta in 0..1, the share of the old average that a step of `batch` images keeps. seen_kimg includes this step."""

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], batch: int, seen_kimg: float, buffers: Iterable[Tensor] = ()) -> None:
        """average = beta average + (1 - beta) parameters, after a step of `batch` images that ended at seen_kimg.

        Buffers are copied, not averaged; pass the module's buffers if training changes them. Both are in the module's order.
        """
        share = 1 - self.beta(batch, seen_kimg)
        # One kernel for all tensors, because on a GPU hundreds of launches would take longer than the arithmetic.
        torch._foreach_lerp_(list(self.module.parameters()), list(parameters), share)
        if changed := list(buffers):
            torch._foreach_copy_(list(self.module.buffers()), changed)


class Ema(Average[Averaged]):
    """Exponential average: beta = 0.5 ** (batch / H) with H = min(halflife, rampup_ratio * seen), all in images.

    The ramp-up is EDM's (arXiv 2206.00364). It makes the average forget the initial weights soon. None switches it off.
    """

    def __init__(self, module: Averaged, halflife_kimg: float, rampup_ratio: float | None):
        super().__init__(module)
        self.halflife_kimg, self.rampup_ratio = halflife_kimg, rampup_ratio
        self.name = f"halflife-{halflife_kimg:g}kimg"

    # beta = 2^(-batch / H), H = min(halflife, rampup_ratio seen), as in EDM's training loop (arXiv 2206.00364).
    # After H images the old average counts half, whatever the batch.
    def beta(self, batch: int, seen_kimg: float) -> float:
        """beta of a step of `batch` images that ended at seen_kimg."""
        halflife_kimg = self.halflife_kimg
        if self.rampup_ratio is not None:
            halflife_kimg = min(halflife_kimg, self.rampup_ratio * seen_kimg)
        return float(0.5 ** (batch / max(1000 * halflife_kimg, 1e-8)))


class PowerEma(Average[Averaged]):
    """EDM2's power function: the weights at time t count as t^gamma, so the width of the average grows with training time.

    beta = (1 - batch / seen) ** (gamma + 1), in images: beta_t of Karras et al. 2024 (arXiv 2312.02696, section 3.1) for
    steps of `batch`. std is the profile's standard deviation relative to training time (sigma_rel; EDM2 uses 0.05 and 0.10).
    The first step has beta = 0, so the initial weights are forgotten. Raises RequestError for std outside 0.005..0.28.
    """

    def __init__(self, module: Averaged, std: float):
        self.std, self.gamma = std, power_exponent(std)
        super().__init__(module)
        self.name = f"power-{std:g}"

    # beta_t = (1 - 1/t)^(gamma + 1), t in steps (arXiv 2312.02696, section 3.1). At t = 1 it is 0, so nothing of the random
    # initial weights is left, whatever the width.
    def beta(self, batch: int, seen_kimg: float) -> float:
        """beta of a step of `batch` images that ended at seen_kimg."""
        seen = max(1000 * seen_kimg, batch)  # because of rounding, seen could be below batch in the first step
        return float((1 - batch / seen) ** (self.gamma + 1))


class Averages(Generic[Averaged]):
    """Several averages of one module, by name ('halflife-5kimg', 'power-0.05'). Each costs the memory of one copy of it.

    `primary`, the average of the first half-life, is evaluated and published. Raises RequestError if there is no half-life, or
    if an average is given twice.
    """

    def __init__(
        self,
        module: Averaged,
        halflives_kimg: Sequence[float],
        power_widths: Sequence[float] = (),
        *,
        rampup_ratio: float | None,
    ):
        # Each average is a copy of the module. Their number is up to the user's recipe.
        emas = [Ema(module, halflife, rampup_ratio) for halflife in halflives_kimg]
        averages: list[Average[Averaged]] = [*emas, *(PowerEma(module, std) for std in power_widths)]
        if not emas:
            raise RequestError("no half-life for averaging the weights is given", remedy="give at least one, in kimg")
        self.primary: Ema[Averaged] = emas[0]
        self._averages = {average.name: average for average in averages}
        if len(self._averages) < len(averages):
            names = ", ".join(average.name for average in averages)
            raise RequestError(f"two of the averages {names} are the same", remedy="give each once")

    def update(self, parameters: Iterable[Tensor], batch: int, seen_kimg: float, buffers: Iterable[Tensor] = ()) -> None:
        """Update all averages after a step; see `Average.update`."""
        weights, changed = list(parameters), list(buffers)
        for average in self._averages.values():
            average.update(weights, batch, seen_kimg, changed)

    def __iter__(self) -> Iterator[Average[Averaged]]:
        """Every average, the primary one first."""
        return iter(self._averages.values())

    def modules(self) -> dict[str, Averaged]:
        """The modules that hold the averages, by name, the primary one first."""
        return {name: average.module for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The modules' states by name. As in torch, the tensors are not copies."""
        return {name: dict(module.state_dict()) for name, module in self.modules().items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_dict` returned. Raises FileFormatError if the state has other averages."""
        modules = self.modules()
        # An average cannot be added later, because it would lack the training so far.
        if state.keys() != modules.keys():
            raise FileFormatError(
                f"the state holds the averages {', '.join(state)}, not {', '.join(modules)}",
                remedy="resume with the half-lives and widths of averages (ema_halflife_kimg, ema_power_std) that the run was "
                "started with",
            )
        for name, module in modules.items():
            module.load_state_dict(state[name])


# sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (arXiv 2312.02696, appendix C), ordered by powers of gamma:
# gamma^3 + 7 gamma^2 + (16 - 1/sigma_rel^2) gamma + (12 - 1/sigma_rel^2) = 0.
def power_exponent(std: float) -> float:
    """gamma of the profile t^gamma on 0..1 with standard deviation std: 16.97 for 0.05, 6.94 for 0.10.

    It is the largest root of the cubic std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (arXiv 2312.02696, appendix C).
    Raises RequestError for std outside 0.005..0.28.
    """
    if not MIN_AVERAGE_WIDTH <= std <= WIDEST_AVERAGE:
        raise RequestError(
            f"width {std:g} of a power-function average is out of range",
            remedy=f"give {MIN_AVERAGE_WIDTH:g} to {WIDEST_AVERAGE:g}, relative to training time",
        )
    precision = std**-2
    cubic = np.polynomial.Polynomial([12 - precision, 16 - precision, 7.0, 1.0])
    return float(cubic.roots().real.max())
