"""Reads numbers as the document writes them (16 GB, 6.25%, 7.67 million) and formats measured ones in the same unit."""

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
    """A number, text or bool. `unit` is one of UNITS or empty; `value` is without the unit's factor (16 GB is 16e9)."""

    value: float | int | str | bool
    unit: str = ""

    def __str__(self) -> str:
        return in_unit(self.value, self.unit)


def read(written: Any) -> Quantity:
    """Read a value of a claims file, such as 64, "16 GB" or tisch."""
    if not isinstance(written, str):
        return Quantity(written)
    match = NUMBER.fullmatch(written.strip())
    if match is None or (match[2] and match[2] not in UNITS):
        return Quantity(written)
    text = match[1].replace(",", "")
    value = int(text) if text.lstrip("-").isdigit() else float(text)
    if match[2]:
        exact = value * UNITS[match[2]]
        value = float(f"{exact:.12g}")  # so that 6.25% is exactly 0.0625
    return Quantity(value, match[2])


def in_unit(value: Any, unit: str) -> str:
    """Format a value for display: three digits and its unit, integers in full, a Spread as mean ± deviation.

    A mapping of conditions becomes "name: value; name: value", a list (a shape) "a × b".
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {in_unit(item, unit)}" for name, item in value.items())
    if isinstance(value, list):
        return " × ".join(in_unit(item, unit) for item in value)
    if isinstance(value, Spread):
        return _format_spread(value, unit)
    if isinstance(value, str | bool) or value is None:
        return shown(value)
    if not unit:
        return shown(value) if isinstance(value, int) else _format_number(value)
    number = _format_number(value / UNITS[unit])
    return f"{number}%" if unit == "%" else f"{number} {unit}"


def _format_spread(value: Spread, unit: str) -> str:
    """Mean ± the largest deviation, both to the deviation's first digit; without it if it rounds to 0."""
    scale, max_decimals = UNITS.get(unit, 1), 1 if unit == "%" else 3
    deviation = max(value.high - value.mean, value.mean - value.low) / scale
    if round(deviation, max_decimals) == 0:
        return in_unit(value.mean, unit)
    decimals = min(max_decimals, max(0, -math.floor(math.log10(deviation))))
    mean, plus_minus = f"{value.mean / scale:,.{decimals}f}", f"±{deviation:,.{decimals}f}"
    return f"{mean}% {plus_minus}" if unit == "%" else f"{mean} {plus_minus} {unit}".strip()


def _format_number(value: float) -> str:
    """Three significant digits; from 1,000 on all digits before the point."""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.7f}".rstrip("0") if "e-0" in text and abs(value) >= 1e-5 else text


PLACEHOLDER = re.compile(r"\{(\w+)((?:\.\w+)*)(?::([^{}]*))?\}")  # {name}, {name.part}, {name:unit}


def check_template(template: str, names: Collection[str]) -> None:
    """Raises UserError for a placeholder with an unknown name or unit, and for a stray brace."""
    for name, _, unit in PLACEHOLDER.findall(template):
        if name not in names:
            raise UserError(f"{{{name}}} in `{template}` is not a value. Values: {', '.join(names)}")
        if unit and unit not in UNITS:
            raise UserError(f"{{{name}:{unit}}}: there is no unit {unit}. Use one of {', '.join(UNITS)}")
    if set(PLACEHOLDER.sub("", template)) & set("{}"):
        raise UserError(f"`{template}` has a brace outside of {{name}} and {{name:unit}}")


def fill_template(template: str, values: Mapping[str, Any]) -> str:
    """Replace the placeholders of a checked template. Raises UserError if {name.part} does not exist."""

    def replacement(match: re.Match[str]) -> str:
        value = values[match[1]]
        for part in match[2].split(".")[1:]:
            if not isinstance(value, Mapping) or part not in value:
                raise UserError(f"{match[0]} in `{template}`: there is no {part}")
            value = value[part]
        return in_unit(value, match[3] or "")

    return PLACEHOLDER.sub(replacement, template)
