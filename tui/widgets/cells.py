"""Texts in cells: bars, intervals, durations, signs of methods."""

from rich.cells import cell_len, set_cell_size
from textual.content import Content

from tui.widgets.colors import NO_LOOK, look_style, method_look, share_style

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = "▁▂▃▄▅▆▇█"
INTERVAL = 12  # cells of an interval from 0 to 1


def bar(share: float, width: int) -> str:
    """A horizontal bar that fills `share` (0 to 1) of `width` cells; a share above 0 is always
    visible.
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8) or int(share > 0)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width)


def levels(values: list[float]) -> str:
    """A column per value (a sparkline), the largest at full height; zero is the lowest."""
    top = max(values, default=0.0) or 1.0
    return "".join(LEVELS[round(value / top * (len(LEVELS) - 1))] for value in values)


def pad_or_truncate(text: str, width: int) -> str:
    """`text` in exactly `width` cells (a Chinese character takes two); truncated text ends with
    …
    """
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    return set_cell_size(text, width - 1) + "…"


def duration(seconds: float) -> str:
    """4 s, 2 min 5 s, 3 h 20 min."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def bar_cell(share: float, width: int, style: str, words: str) -> Content:
    """`██████▌  81%`"""
    return Content.assemble((bar(share, width), style), f" {words}")


def share_cell(share: float | None, width: int) -> Content:
    """A bar and its number; the colour says how much is missing."""
    if share is None:
        return Content.styled("–", "$foreground-muted")
    return bar_cell(share, width, share_style(1 - share), f"{share:>4.0%}")


def interval_strip(low: float, value: float, high: float, width: int = INTERVAL) -> str:
    """A 95% interval from 0 to 1 in cells: `  ──●────  `."""
    first, at, last = (round(min(max(n, 0.0), 1.0) * (width - 1)) for n in (low, value, high))
    cells = ["─" if first <= n <= last else "·" for n in range(width)]
    cells[at] = "●"
    return "".join(cells)


def method_sign(name: str) -> tuple[str, str]:
    """The sign of a method and its style; of a base a ring in the text's colour."""
    look = method_look(name)
    return ("○", "$foreground") if look is NO_LOOK else (look.sign, look_style(look))
