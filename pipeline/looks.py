"""How a run looks wherever it is drawn: a colour of Okabe & Ito's, which every reader tells apart, and a sign."""

from dataclasses import dataclass

COLORS = {"full": "#D55E00", "freeze": "#E69F00", "lora": "#0072B2"}
OTHERS = ("#009E73", "#CC79A7", "#56B4E9", "#999999")
SIGNS = "●▲■◆▼○△□◇▽"


@dataclass(frozen=True)
class Look:
    color: str
    sign: str


METHODS = {f"finetune_{name}": Look(color, sign) for (name, color), sign in zip(COLORS.items(), SIGNS, strict=False)}


def other(number: int) -> Look:
    """The look of the `number`th run that is none of the three methods' last: 20 that differ, then again."""
    signs = SIGNS[len(COLORS) :]
    return Look(OTHERS[number % len(OTHERS)], signs[number % len(signs)])
