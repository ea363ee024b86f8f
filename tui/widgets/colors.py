"""Colours: each method's own, readable on any background, and a scale for magnitudes.

Which run has which look is decided in pipeline/views/looks.py.
"""

from textual.color import Color

from pipeline.project.stage_graph import Look
from pipeline.stages.registry import METHODS
from pipeline.views.looks import OTHERS

CONTRAST = 4.5  # minimum contrast of text against the background (WCAG's value)
NO_LOOK = Look("#808080", "·")
LOOKS = {name: stage.look for name, stage in METHODS.items() if stage.look}


def method_look(name: str) -> Look:
    """The colour and sign of a method on every screen, by its name or that of its stage
    (`finetune_lora`).
    """
    return LOOKS.get(name.removeprefix("finetune_"), NO_LOOK)


def look_style(look: Look) -> str:
    """The style of what has this look: a theme variable, readable on the theme's background."""
    return f"$look-{look.color.lstrip('#')}"


def look_variables(background: Color) -> dict[str, str]:
    """The theme variables that `look_style` names."""
    looks = (*LOOKS.values(), NO_LOOK, *(Look(color, "") for color in OTHERS))
    return {
        look_style(look)[1:]: readable(Color.parse(look.color), background).hex for look in looks
    }


def share_style(share: float) -> str:
    """The theme variable for a magnitude of which less is better: a load, a loss of what was
    known.
    """
    if share < 0.5:
        return "$success"
    return "$warning" if share < 0.85 else "$error"


def readable(color: Color, background: Color) -> Color:
    """`color`, made lighter or darker until its contrast with `background` is at least CONTRAST."""
    towards = Color(255, 255, 255) if background.brightness < 0.5 else Color(0, 0, 0)
    blends = (color.blend(towards, part / 10) for part in range(10))
    return next((each for each in blends if contrast(each, background) >= CONTRAST), towards)


def contrast(one: Color, other: Color) -> float:
    """The ratio of two colours' luminances, 1 to 21 (WCAG 2)."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: Color) -> float:
    red, green, blue = (
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color.normalized
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
