"""What a plot can show: axes, lines, points, bars, rules."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10, nan

from tui.panes.plot.scale import Range, fit, is_drawable, power_of_ten, spans_decade, ticks

XY = tuple[float, float]
SHARES = (0.1, 0.2, 0.25, 0.5, 1.0)  # steps of an axis in percent


@dataclass(frozen=True)
class Axis:
    """A quantity. `range` None: that of what is drawn; of a logarithmic axis in exponents of ten.

    `log` None: where the values span a decade. `falls`: less is better, and is drawn where more of
    others would be. `share`: from 0 to 1, written in percent. `marks`: the values that are written
    at the axis with their labels, such as ranks that were tried; else it has ticks.
    """

    title: str = ""
    range: Range | None = None
    log: bool | None = False
    falls: bool = False
    share: bool = False
    marks: Sequence[tuple[float, str]] = ()
    shown: bool = True  # ticks and grid

    def fitted(self, values: Iterable[float], margin: bool = True) -> "Scale":
        """The axis with room for all values."""
        known = [value for value in values if isfinite(value)]
        log = spans_decade(known) if self.log is None else self.log
        if self.range:
            low, high = self.range
        elif self.share:
            least = min(max(min(known, default=0.0), 0.0), 0.9)
            low, high = floor(least * 10) / 10, 1.0
        elif margin or log:
            low, high = fit(known, log)
        else:
            low, high = min(known, default=0.0), max(known, default=1.0)
        if not is_drawable((low, high)):
            around = max(1.0, abs(low) * 1e-6)
            low, high = low - around, low + around
        return Scale(self, low, high, log)


@dataclass(frozen=True)
class Scale:
    """An axis whose range is known."""

    axis: Axis
    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Where a value is drawn, from 0 at the left or below to 1; NaN if it has no place."""
        if self.log:
            value = log10(value) if value > 0 else nan
        share = (value - self.low) / (self.high - self.low)
        return 1 - share if self.axis.falls else share

    def value_at(self, share: float) -> float:
        """The value, or its exponent of ten, that is drawn at a share of the length."""
        return self.low + (self.high - self.low) * (1 - share if self.axis.falls else share)

    def zoomed(self, factor: float, centre: float | None = None) -> Range:
        """The range scaled about a value, or about the middle."""
        middle = (self.low + self.high) / 2 if centre is None else centre
        # With a factor of 1 the same, and not only nearly.
        return self._range(*(end + (middle - end) * (1 - factor) for end in (self.low, self.high)))

    def panned(self, part: float) -> Range:
        """The range shifted by a part of its length."""
        by = (self.high - self.low) * part
        return self._range(self.low + by, self.high + by)

    def _range(self, low: float, high: float) -> Range:
        """A range; what cannot be drawn stays as it is."""
        return (low, high) if is_drawable((low, high)) else (self.low, self.high)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most `most` values to write at the axis, with their labels."""
        axis, low, high = self.axis, self.low, self.high
        if axis.marks:
            return list(axis.marks[:: ceil(len(axis.marks) / max(most, 1))])
        if axis.share:
            steps = (step for step in SHARES if floor((high - low) / step + 1e-9) < most)
            step = next(steps, SHARES[-1])
            first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
            return [(n * step, f"{n * step:.0%}") for n in range(first, last + 1)]
        found = ticks((low, high), most, self.log)
        return [(power_of_ten(at) if self.log else at, label) for at, label in found]


@dataclass(frozen=True)
class Line:
    """Points sorted by x, and what is drawn beside them; later lines lie on top of earlier ones.

    `band`: x, low, high of what was smoothed, as a faint background. `marks`: single measurements,
    as × on a line of dots. `flat`: a point marked ». `sign`, `label` and `value` are written beside
    the end. A `bold` line is two dots high, and a `stray` one does not affect the range of y.
    """

    points: Sequence[XY]
    style: str = ""
    label: str = ""
    value: str = ""
    sign: str = ""
    band: Sequence[tuple[float, float, float]] = ()
    band_style: str = ""
    marks: Sequence[XY] = ()
    flat: XY | None = None
    bold: bool = False
    stray: bool = False


@dataclass(frozen=True)
class Point:
    """A sign with a label beside it, which may be empty. The ranges are drawn as lines through it."""

    x: float
    y: float
    sign: str
    label: str = ""
    style: str = ""
    pointed: bool = False  # its label is in reverse
    x_range: Range | None = None
    y_range: Range | None = None


@dataclass(frozen=True)
class Bars:
    """For so many columns of cells a value from 0 and its style each."""

    columns: Callable[[int], Sequence[tuple[float, str]]]


@dataclass(frozen=True)
class Rule:
    """A line across the plot at an x, with a label below it, or at a y, below bars."""

    x: float = nan
    y: float = nan
    label: str = ""
    style: str = ""


Series = Line | Point | Bars | Rule
