"""A claim of the document: what it says, by which rule that holds, and the function that measures
it.

    chapter = Chapter()

    with chapter.section("3") as claim:

        @claim("MiniGPT, adapter size (FP16): ≈ 8 KB", about("8 KB", "5%"))
        def minigpt_adapter_size() -> Result:
            return calc("minigpt", rank=4).adapter_bytes.fp16, "2 bytes for each of 4,096 parameters"

The function's name is the claim's id. It takes the project's Sources, or nothing if it needs only
the calculator, and returns what it measured, a value or one for each condition, with the reason: a
text that is true whichever way the verdict falls. The verdict is computed: all conditions hold,
none does (differs), or some do (depends).
"""

import inspect
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lab.tables import Spread, shown

Result = tuple[Any, str]  # what was measured, and why
Measure = Callable[..., Result]

# Numbers as the document writes them (16 GB, 6.25%, 7.67 million), read, and measured ones shown in
# the same unit.
UNITS: Mapping[str, float] = {
    "%": 1e-2,
    "points": 1e-2,
    "thousand": 1e3,
    "million": 1e6,
    "billion": 1e9,
    "×": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
NUMBER = re.compile(r"(-?[\d,]*\.?\d+(?:e-?\d+)?)\s*([%×a-zA-Z]*)")


@dataclass(frozen=True)
class Quantity:
    """A number, text or bool. `unit` is one of UNITS or empty; `value` is without the unit's factor
    (16 GB is 16e9).
    """

    value: Any
    unit: str = ""

    @classmethod
    def read(cls, written: Any) -> "Quantity":
        """A value as the document writes it: 64, True, "16 GB", "7.67 million", or any other text
        as it is.
        """
        match = NUMBER.fullmatch(written) if isinstance(written, str) else None
        if match is None or (match[2] and match[2] not in UNITS):
            return cls(written)
        text = match[1].replace(",", "")
        value = int(text) if text.lstrip("-").isdigit() else float(text)
        if not match[2]:
            return cls(value)
        # rounded, so that 6.25% is exactly 0.0625
        return cls(float(f"{value * UNITS[match[2]]:.12g}"), match[2])

    def __str__(self) -> str:
        return in_unit(self.value, self.unit)


def in_unit(value: Any, unit: str = "") -> str:
    """A value for display: three digits and its unit, integers in full, seeds as mean ± deviation,
    a list as a × b.
    """
    if isinstance(value, list):
        return " × ".join(in_unit(item, unit) for item in value)
    if isinstance(value, Spread):
        # Mean ± the largest deviation, both to the deviation's first digit; without it if it rounds
        # to 0.
        scale, most = UNITS.get(unit, 1), 1 if unit == "%" else 3
        deviation = max(value.high - value, value - value.low) / scale
        if round(deviation, most) > 0:
            decimals = min(most, max(0, -math.floor(math.log10(deviation))))
            mean, spread = f"{value / scale:,.{decimals}f}", f"±{deviation:,.{decimals}f}"
            return f"{mean}% {spread}" if unit == "%" else f"{mean} {spread} {unit}".strip()
    if isinstance(value, str | bool) or value is None or (isinstance(value, int) and not unit):
        return shown(value)
    number = value / UNITS[unit] if unit else value
    # Three significant digits; from 1,000 on all digits before the point, below 0.001 no exponent.
    text = f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:.3g}"
    text = f"{number:.7f}".rstrip("0") if "e-0" in text and abs(number) >= 1e-5 else text
    return f"{text}%" if unit == "%" else f"{text} {unit}".strip()


@dataclass(frozen=True)
class Rule:
    """What the document says of a value: `compare(value, *says)`; `sign` is shown before `says`.

    `margin` is the allowed distance from the document's number: a share of it in %, or a difference
    in another unit.
    """

    name: str
    says: tuple[Quantity, ...]
    compare: Callable[..., bool]
    sign: str = ""
    margin: str | float | None = None

    def holds(self, value: Any) -> bool:
        """Whether a measured value is as the document says. Raises TypeError if it is of another
        kind.
        """
        says = [said.value for said in self.says]
        if _kind(value) != _kind(says[0]):
            raise TypeError(
                f"it measures {_kind(value)} ({value!r}), but the document says {_kind(says[0])} "
                f"({says[0]!r})"
            )
        if self.margin is None:
            return bool(self.compare(value, *says))
        # slack: exactly the margin still holds
        return bool(abs(value - says[0]) <= self._distance * (1 + 1e-9))

    @property
    def _distance(self) -> float:
        margin = Quantity.read(self.margin)
        return float(margin.value * (abs(self.says[0].value) if margin.unit == "%" else 1))

    def __str__(self) -> str:
        """Such as "≥ 50%", "5 × to 10 ×" or "16 GB ± 0.8 GB": a margin in the document's unit, or
        in points for %.
        """
        said, unit = " to ".join(map(str, self.says)), self.says[0].unit
        if self.margin is None:
            return f"{self.sign} {said}".strip()
        margin = self.margin
        if Quantity.read(margin).unit == "%":
            margin = in_unit(self._distance, "points" if unit == "%" else unit)
        return f"{said} ± {margin}"


def _kind(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return {bool: "true or false", str: "a text", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _comparison(name: str, compare: Callable[..., bool], sign: str) -> Callable[[Any], Rule]:
    return lambda said: Rule(name, (Quantity.read(said),), compare, sign)


equal = _comparison("equal", operator.eq, "")
at_least = _comparison("at_least", operator.ge, "≥")
at_most = _comparison("at_most", operator.le, "≤")
more_than = _comparison("more_than", operator.gt, ">")
less_than = _comparison("less_than", operator.lt, "<")


def between(low: Any, high: Any) -> Rule:
    return Rule(
        "between",
        (Quantity.read(low), Quantity.read(high)),
        lambda value, low, high: low <= value <= high,
    )


def about(said: Any, margin: str | float) -> Rule:
    """Equal within a margin: "5%" of what is said, or a difference such as "15 points" or 0.5."""
    return replace(equal(said), margin=margin)


def probability(said: str) -> Rule:
    """About a probability: within 15 points, or half of it where that is less."""
    return about(said, "15 points" if Quantity.read(said).value >= 0.3 else "50%")


@dataclass(frozen=True)
class Claim:
    """One statement of the document and how it is measured."""

    id: str
    section: str
    quote: str
    rule: Rule
    measure: Measure
    words: str = ""  # the document's wording, if the rule's number is our reading of it
    each_seed: bool = False  # whether the least and the greatest of several seeds must hold too

    @property
    def calculated(self) -> bool:
        """Whether it needs only the calculator and no project: its function takes no Sources."""
        return not inspect.signature(self.measure).parameters


class Chapter(list[Claim]):
    """The claims of a chapter, in the document's order."""

    @contextmanager
    def section(self, number: str) -> Iterator[Callable[..., Callable[[Measure], Measure]]]:
        """Gives the decorator for a section's claims: `claim(quote, says, words=…, each_seed=…)`.

        `says` is a Rule, or a value that must be measured exactly. `id` is for functions that are
        made in a loop.
        """

        def claim(
            quote: str, says: Any, *, id: str = "", **options: Any
        ) -> Callable[[Measure], Measure]:
            def add(measure: Measure) -> Measure:
                name = id or measure.__name__.strip("_").replace("_", "-")
                rule = says if isinstance(says, Rule) else equal(says)
                self.append(Claim(name, number, quote, rule, measure, **options))
                return measure

            return add

        yield claim
