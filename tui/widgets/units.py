"""Sizes of memory in one unit, so that a column has one."""

from collections.abc import Iterable
from typing import NamedTuple

KIB, MIB, GIB = 2**10, 2**20, 2**30


class Unit(NamedTuple):
    """GiB, MiB or KiB, and how many digits follow the point."""

    name: str
    bytes: int
    digits: int = 2

    def format(self, size: float) -> str:
        """19.91; 0 for nothing at all, <0.01 for what is too small to be seen beside the others."""
        if not size:
            return "0"
        smallest = 10.0**-self.digits
        return (
            f"<{smallest:g}"
            if 0 < size / self.bytes < smallest / 2
            else f"{size / self.bytes:,.{self.digits}f}"
        )

    def format_change(self, size: int) -> str:
        """+1.20, −2.68, or 0."""
        return f"{_sign(size)}{self.format(abs(size))}"

    def __str__(self) -> str:
        return self.name


def unit_of(sizes: Iterable[int]) -> Unit:
    """The unit for sizes that are shown together, by the largest."""
    largest = max(sizes, default=0)
    name, size = next(
        ((n, s) for n, s in (("GiB", GIB), ("MiB", MIB)) if largest >= s), ("KiB", KIB)
    )
    return Unit(name, size, 0 if largest >= 10_000 * size else 2)


def format_count_change(count: int) -> str:
    """+1,200, −6,193,152, or 0."""
    return f"{_sign(count)}{abs(count):,}"


def _sign(number: float) -> str:
    if number < 0:
        return "−"
    return "+" if number else ""


def short_count(count: int) -> str:
    """8.19 B, 135 M, 110 k: three digits."""
    for size, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            value = count / size
            digits = (value < 10) + (value < 100)
            return f"{value:.{digits}f}{name}"
    return str(count)


def percent(share: float) -> str:
    """0.0936%, 12.3%, 100%: three digits at most, and four after the point."""
    value = 100 * share
    if 0 < value < 0.00005:
        return "<0.0001%"
    digits = next((n for n in range(5) if value * 10**n >= 99.95), 4)
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"
