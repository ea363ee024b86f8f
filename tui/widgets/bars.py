"""Bars of block characters, with a resolution of an eighth of a cell, and text of a fixed width."""

from rich.cells import cell_len, set_cell_size

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = "▁▂▃▄▅▆▇█"
SHADES = " ·░▒▓█"


def bar(share: float, width: int) -> str:
    """A horizontal bar that fills `share` (0 to 1) of `width` cells; a share above 0 is always visible."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8) or int(share > 0)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width)


def levels(values: list[float]) -> str:
    """A column per value (a sparkline), the largest at full height; zero is the lowest."""
    top = max(values, default=0.0)
    return "".join(LEVELS[round(value / top * (len(LEVELS) - 1)) if top > 0 else 0] for value in values)


def shade(share: float) -> str:
    """A character that is darker the larger `share` (0 to 1) is."""
    return SHADES[min(int(share * (len(SHADES) - 1) + 0.999), len(SHADES) - 1)] if share > 0 else SHADES[0]


def pad_or_truncate(text: str, width: int) -> str:
    """`text` in exactly `width` cells (a Chinese character takes two); truncated text ends with …"""
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"
