"""Colours that are readable on a dark and on a light background."""

from textual.color import Color

CONTRAST = 4.5  # minimum contrast of a line against the background (WCAG's value for text)


def readable(color: Color, background: Color) -> Color:
    """`color`, made lighter or darker until its contrast with `background` is at least CONTRAST."""
    towards = Color(255, 255, 255) if background.brightness < 0.5 else Color(0, 0, 0)
    for part in range(0, 11):
        blended = color.blend(towards, part / 10)
        if contrast(blended, background) >= CONTRAST:
            break
    return blended


def contrast(one: Color, other: Color) -> float:
    """The ratio of two colours' luminances, 1 to 21 (WCAG 2)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: Color) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color.normalized]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
