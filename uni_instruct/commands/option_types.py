"""Numbers of the command line: each option has a range, and 'nan' is in none."""

import math
from typing import Any

import rich_click as click


class FiniteRange(click.FloatRange):
    """A float from min to max. click's own lets 'nan' through: it is not below the one, nor above the other."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Fails with click's line, which names option, value and range."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number
