"""The color and sign of a run in every chart. Colors are Okabe and Ito's, which color-blind readers can distinguish."""

from dataclasses import dataclass
from typing import Any

OTHERS = ("#999999", "#009E73", "#CC79A7")
OTHER_SIGNS = "○△□◇▽◀▶◁▷"


@dataclass(frozen=True)
class Look:
    """A curve's color and sign; in print also its `dash`, as matplotlib takes it, and the `hatch` of its bar."""

    color: str
    sign: str
    dash: Any = "-"
    hatch: str = ""


def other(number: int) -> Look:
    """The look of the `number`th older run. There are 20 different looks, then they repeat."""
    return Look(OTHERS[number % len(OTHERS)], OTHER_SIGNS[(number + number // len(OTHERS)) % len(OTHER_SIGNS)])
