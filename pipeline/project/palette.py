"""The color and sign of a run in every chart. Colors are Okabe and Ito's, which color-blind readers can distinguish."""

from dataclasses import dataclass

COLORS = {
    **{"full": "#D55E00", "freeze": "#E69F00", "lora": "#0072B2"},
    **{"prefix": "#009E73", "prompt": "#CC79A7", "scratch": "#56B4E9"},
}
OTHERS = ("#999999", "#009E73", "#CC79A7")
SIGNS = "●▲■◈◆▼○△□◇▽◀▶◁▷"


@dataclass(frozen=True)
class Look:
    color: str
    sign: str


STAGES = (*(f"finetune_{name}" for name in COLORS if name != "scratch"), "train_from_scratch")
METHODS = {
    stage: Look(color, sign) for stage, color, sign in zip(STAGES, COLORS.values(), SIGNS[: len(STAGES)], strict=True)
}
METHODS["finetune_sweep"] = Look("#F0E442", "★")  # its best adapter; the others are dimmed


def other(number: int) -> Look:
    """The look of the `number`th older run. There are 20 different looks, then they repeat."""
    signs = SIGNS[len(COLORS) :]
    return Look(OTHERS[number % len(OTHERS)], signs[(number + number // len(OTHERS)) % len(signs)])
