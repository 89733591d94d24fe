"""Types of command-line options: floats in a range that never includes 'nan'."""

import math
from typing import Any

import rich_click as click


class FiniteRange(click.FloatRange):
    """A float from min to max. click's FloatRange accepts 'nan', since it is neither below min nor above max."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Fails with click's usual error, which names the option, the value and the range."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number
