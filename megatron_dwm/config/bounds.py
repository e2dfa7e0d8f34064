"""Bounds of the numbers in a configuration; every numeric key of the schema names its bound.

Within these bounds nothing overflows in fp32, seeds fit the generators, and counts fit the arrays
that they index. The bounds are wide: they exclude what cannot work, not what is unwise.
"""

from __future__ import annotations

from dataclasses import dataclass

_MAX_COUNT = 10**9
_MAX_WIDTH = 2**20
_MAX_RATE = 1e4
_MAX_FACTOR = 1e30
"""well below fp32's largest number, 3.4e38, so that a product still fits"""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A range of numbers. An end is included unless it is open; None means no limit on that side.

    or_zero: 0 is allowed too, though it lies outside the range.
    """

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    or_zero: bool = False

    def allows(self, value: float) -> bool:
        """True if `value` is in the range; NaN and the infinities are in no range."""
        if not -float("inf") < value < float("inf"):
            return False
        return (self.or_zero and value == 0) or (self._above_low(value) and self._below_high(value))

    def _above_low(self, value: float) -> bool:
        if self.low is None:
            return True
        return self.low < value if self.low_open else self.low <= value

    def _below_high(self, value: float) -> bool:
        if self.high is None:
            return True
        return value < self.high if self.high_open else value <= self.high

    def __str__(self) -> str:
        return f"{self._range()}, or 0" if self.or_zero else self._range()

    def _range(self) -> str:
        low = None if self.low is None else _short(self.low)
        high = None if self.high is None else _short(self.high)
        if low is None or self.low_open:
            upper = f"{'below' if self.high_open else 'at most'} {high}" if high else ""
            lower = f"above {low}" if low else ""
            return ", ".join(part for part in (lower, upper) if part) or "finite"
        if high is None:
            return f"{low} or more"
        return f"from {low} to {'below ' if self.high_open else ''}{high}"


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


COUNT = Bound(low=1, high=_MAX_COUNT)
COUNT_OR_ZERO = Bound(low=0, high=_MAX_COUNT)
ROWS = Bound(low=1, high=10**7)
# A pool is in memory as a whole, and is scored before one step.
POOL = Bound(low=1, high=1000)
TOKENS = Bound(low=1, high=2**24)
WIDTH = Bound(low=1, high=_MAX_WIDTH)
INNER_WIDTH = Bound(low=1, high=8 * _MAX_WIDTH)
LAYERS = Bound(low=1, high=10**5)
PIECES = Bound(low=1, high=2**31 - 1)
SEED = Bound(low=0, high=2**63 - 1)
SECONDS = Bound(low=1, high=366 * 24 * 3600)
FRACTION = Bound(low=0.0, high=1.0, high_open=True)
WHOLE_FRACTION = Bound(low=0.0, high=1.0)
FRACTION_ABOVE_ZERO = Bound(low=0.0, high=1.0, low_open=True)
POWER = Bound(low=0.01, high=100.0)
RATE = Bound(low=0.0, high=_MAX_RATE, low_open=True)
DECAY = Bound(low=0.0, high=_MAX_RATE)
FACTOR = Bound(low=0.0, high=_MAX_FACTOR)
FACTOR_ABOVE_ZERO = Bound(low=0.0, high=_MAX_FACTOR, low_open=True)
FACTOR_ABOVE_ONE = Bound(low=1.0, high=_MAX_FACTOR, low_open=True, or_zero=True)
TEMPERATURE = Bound(low=1e-6, high=_MAX_FACTOR)
EPSILON = Bound(low=1 / _MAX_FACTOR, high=1e10)
DEVIATION = Bound(low=0.0, high=1e10)
