"""Text in cells: bars, padding, durations, and a block of lines that is drawn for the width
available.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from tui.widgets.table import VIM_KEYS

EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = "▁▂▃▄▅▆▇█"
SHADES = " ·░▒▓█"


def bar(share: float, width: int) -> str:
    """A horizontal bar that fills `share` (0 to 1) of `width` cells; a share above 0 is always
    visible.
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8) or int(share > 0)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width)


def levels(values: list[float]) -> str:
    """A column per value (a sparkline), the largest at full height; zero is the lowest."""
    top = max(values, default=0.0)
    return "".join(
        LEVELS[round(value / top * (len(LEVELS) - 1)) if top > 0 else 0] for value in values
    )


def shade(share: float) -> str:
    """A character that is darker the larger `share` (0 to 1) is."""
    return (
        SHADES[min(int(share * (len(SHADES) - 1) + 0.999), len(SHADES) - 1)]
        if share > 0
        else SHADES[0]
    )


def pad_or_truncate(text: str, width: int) -> str:
    """`text` in exactly `width` cells (a Chinese character takes two); truncated text ends with
    …
    """
    return (
        set_cell_size(text, width)
        if cell_len(text) <= width
        else set_cell_size(text, width - 1) + "…"
    )


def cells(values: Sequence[str], widths: Sequence[int]) -> str:
    """Values padded to columns: right-aligned for a positive width, left-aligned for a negative
    one.
    """
    return " ".join(
        f"{v:<{-w}}" if w < 0 else f"{v:>{w}}" for v, w in zip(values, widths, strict=True)
    )


def duration(seconds: float) -> str:
    """4 s, 2 min 5 s, 3 h 20 min."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


class Lines(Static):
    """Shows the lines that `draw(width)` returns, and calls it again when the width changes."""

    DEFAULT_CSS = """
    Lines { height: auto; width: 1fr; }
    """
    _draw: Callable[[int], Sequence[Text]] | None = None
    _drawn = (0, 0)  # width that it was drawn for, number of lines

    def show(self, draw: Callable[[int], Sequence[Text]]) -> None:
        self._draw = draw
        self._redraw()

    def on_resize(self) -> None:
        # Textual can lose a layout request made during a layout; the block would stay one line
        # high.
        self.call_after_refresh(
            lambda: self._redraw() if self.size.width != self._drawn[0] else None
        )

    def _redraw(self) -> None:
        width = self.size.width
        if self._draw is None or not width:
            return
        lines: list[Text] = []
        for line in self._draw(width):
            lines += line.wrap(self.app.console, width) if line.cell_len > width else [line]
        before, self._drawn = self._drawn, (width, len(lines))
        self.update(Text("\n", no_wrap=True).join(lines), layout=self._drawn[1] != before[1])


class KeyedList(OptionList):
    """Option ids are the keys. `show` touches only the lines that changed, so the cursor and the
    scroll offset stay.
    """

    DEFAULT_CSS = """
    KeyedList { height: auto; border: none; padding: 0; }
    KeyedList:focus { border: none; }
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *VIM_KEYS,
        Binding("g", "first", "First", show=False),
        Binding("G", "last", "Last", show=False),
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(compact=True, **options)
        self._prompts: dict[str, Text | Content] = {}

    def show(self, prompts: Mapping[str, Text] | Mapping[str, Content], fallback: str = "") -> None:
        """Show these lines. The highlight stays on its key, or moves to `fallback`, or stays at its
        index.
        """
        before, self._prompts = self._prompts, dict(prompts)
        if list(before) == list(prompts):
            for key, prompt in prompts.items():
                if prompt != before[key]:
                    self.replace_option_prompt(key, prompt)
            return
        option, index, keys = self.highlighted_option, self.highlighted or 0, list(prompts)
        if option is not None:
            index = next(
                (keys.index(key) for key in (str(option.id), fallback) if key in prompts), index
            )
        self.set_options(Option(prompt, id=key) for key, prompt in prompts.items())
        self.highlighted = min(index, len(keys) - 1) if keys else None
