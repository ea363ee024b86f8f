"""Numbers as the document writes them (16 GB, 6.25%, 7.67 million), read, and measured ones shown in the same unit."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.document.claims.sources import Seeds
from pipeline.document.tables import shown

UNITS: Mapping[str, float] = {
    **{"%": 1e-2, "points": 1e-2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "×": 1},
    **{"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
}
NUMBER = re.compile(r"(-?[\d,]*\.?\d+(?:e-?\d+)?)\s*([%×a-zA-Z]*)")


@dataclass(frozen=True)
class Quantity:
    """A number, text or bool. `unit` is one of UNITS or empty; `value` is without the unit's factor (16 GB is 16e9)."""

    value: Any
    unit: str = ""

    @classmethod
    def read(cls, written: Any) -> "Quantity":
        """A value as the document writes it: 64, True, "16 GB", "7.67 million", or any other text as it is."""
        match = NUMBER.fullmatch(written) if isinstance(written, str) else None
        if match is None or (match[2] and match[2] not in UNITS):
            return cls(written)
        text = match[1].replace(",", "")
        value = int(text) if text.lstrip("-").isdigit() else float(text)
        if not match[2]:
            return cls(value)
        return cls(float(f"{value * UNITS[match[2]]:.12g}"), match[2])  # rounded, so that 6.25% is exactly 0.0625

    def __str__(self) -> str:
        return in_unit(self.value, self.unit)


def in_unit(value: Any, unit: str = "") -> str:
    """A value for display: three digits and its unit, integers in full, seeds as mean ± deviation, a list as a × b."""
    if isinstance(value, list):
        return " × ".join(in_unit(item, unit) for item in value)
    if isinstance(value, Seeds):
        # Mean ± the largest deviation, both to the deviation's first digit; without it if it rounds to 0.
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


# How a reason writes a value: f"{n(full.trained)} parameters, {percent(share)} of all".
n, percent, times = in_unit, partial(in_unit, unit="%"), partial(in_unit, unit="×")
million, billion = partial(in_unit, unit="million"), partial(in_unit, unit="billion")
B, KB, MB, GB, GiB = (partial(in_unit, unit=unit) for unit in ("B", "KB", "MB", "GB", "GiB"))
