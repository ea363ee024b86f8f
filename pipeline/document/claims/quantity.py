"""Numbers as the document writes them: 16 GB, 6.25%, 7.67 million; and measured ones shown in the same unit."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.document.tables import Spread, shown
from pipeline.errors import UserError

UNITS: Mapping[str, float] = {
    **{"%": 1e-2, "points": 1e-2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "×": 1},
    **{"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
}
NUMBER = re.compile(r"(-?[\d,]*\.?\d+(?:e-?\d+)?)\s*([%×a-zA-Z]*)")


@dataclass(frozen=True)
class Quantity:
    """A number, a text, or true or false, in a unit of UNITS if it has one; `value` is in ones or bytes."""

    value: float | int | str | bool
    unit: str = ""

    def __str__(self) -> str:
        return in_unit(self.value, self.unit)


def read(written: Any) -> Quantity:
    """What stands in a claims file, such as 64, "16 GB" or tisch."""
    if not isinstance(written, str):
        return Quantity(written)
    match = NUMBER.fullmatch(written.strip())
    if match is None or (match[2] and match[2] not in UNITS):
        return Quantity(written)
    text = match[1].replace(",", "")
    value = int(text) if text.lstrip("-").isdigit() else float(text)
    if match[2]:
        exact = value * UNITS[match[2]]
        value = float(f"{exact:.12g}")  # 6.25 of a hundred is 0.0625, not the double nearest to 6.25 × 0.01
    return Quantity(value, match[2])


def in_unit(value: Any, unit: str) -> str:
    """A value as people read it: three digits and its unit, a whole number in full; several seeds as mean ± rest.

    Conditions of which each has a value stand one after the other.
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {in_unit(one, unit)}" for name, one in value.items())
    if isinstance(value, list):
        return " × ".join(in_unit(one, unit) for one in value)  # a shape
    if isinstance(value, Spread):
        return _spread(value, unit)
    if isinstance(value, str | bool) or value is None:
        return shown(value)
    if not unit:
        return shown(value) if isinstance(value, int) else _digits(value)
    number = _digits(value / UNITS[unit])
    return f"{number}%" if unit == "%" else f"{number} {unit}"


def _spread(value: Spread, unit: str) -> str:
    """The mean, and how far a seed lies from it at most, to that one's first digit; alone where it is next to none."""
    scale, most = UNITS.get(unit, 1), 1 if unit == "%" else 3
    far = max(value.high - value.mean, value.mean - value.low) / scale
    if round(far, most) == 0:
        return in_unit(value.mean, unit)
    places = min(most, max(0, -math.floor(math.log10(far))))
    mean, rest = f"{value.mean / scale:,.{places}f}", f"±{far:,.{places}f}"
    return f"{mean}% {rest}" if unit == "%" else f"{mean} {rest} {unit}".strip()


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.7f}".rstrip("0") if "e-0" in text and abs(value) >= 1e-5 else text


PLACE = re.compile(r"\{(\w+)((?:\.\w+)*)(?::([^{}]*))?\}")  # {name}, {name.part}, {name:unit}


def check_template(template: str, names: Collection[str]) -> None:
    """Raises UserError for a place that names no value, or a unit that there is not."""
    for name, _, unit in PLACE.findall(template):
        if name not in names:
            raise UserError(f"{{{name}}} in `{template}` is no value. There are: {', '.join(names)}")
        if unit and unit not in UNITS:
            raise UserError(f"{{{name}:{unit}}}: no unit {unit}. Use one of {', '.join(UNITS)}")
    if set(PLACE.sub("", template)) & set("{}"):
        raise UserError(f"`{template}` has a brace that belongs to no {{name}} or {{name:unit}}")


def filled(template: str, values: Mapping[str, Any]) -> str:
    """A checked template with its values in their places. Raises UserError for a part that a value has not."""

    def put(match: re.Match[str]) -> str:
        value = values[match[1]]
        for part in match[2].split(".")[1:]:
            if not isinstance(value, Mapping) or part not in value:
                raise UserError(f"{match[0]} in `{template}`: there is no {part}")
            value = value[part]
        return in_unit(value, match[3] or "")

    return PLACE.sub(put, template)
