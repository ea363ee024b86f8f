"""Sizes of memory in one unit, so that a column has one; counts and shares in three digits."""

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.views.series import three_digits


class Unit(NamedTuple):
    """GiB, MiB or KiB."""

    name: str
    bytes: int

    def format(self, size: float) -> str:
        """19.91; 0 for nothing at all, <0.01 for what is too small to be seen beside the others."""
        text = f"{size / self.bytes:,.2f}" if size else "0"
        return "<0.01" if text == "0.00" else text

    def format_change(self, size: int) -> str:
        """+1.20, −2.68, or 0."""
        return _signed(size / self.bytes, ",.2f")

    def __str__(self) -> str:
        return self.name


UNITS = Unit("GiB", 2**30), Unit("MiB", 2**20), Unit("KiB", 2**10)
COUNTS = {" T": 10**12, " B": 10**9, " M": 10**6, " k": 10**3}


def unit_of(sizes: Iterable[int]) -> Unit:
    """The unit for sizes that are shown together, by the largest."""
    largest = max(sizes, default=0)
    return next((unit for unit in UNITS if largest >= unit.bytes), UNITS[-1])


def format_count_change(count: int) -> str:
    """+1,200, −6,193,152, or 0."""
    return _signed(count, ",")


def _signed(number: float, form: str) -> str:
    return f"{number:+{form}}".replace("-", "−") if number else "0"


def short_count(count: int) -> str:
    """8.19 B, 135 M, 26 k."""
    name = next((name for name, size in COUNTS.items() if count >= size), "")
    return f"{three_digits(count / COUNTS.get(name, 1))}{name}"


def percent(share: float) -> str:
    """0.0936%, 12.3%, 100%."""
    return f"{three_digits(100 * share)}%"
