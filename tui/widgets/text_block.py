"""A block of text lines that is drawn for the width available."""

from collections.abc import Callable, Sequence

from rich.text import Text
from textual.widgets import Static


class Lines(Static):
    """Shows the lines that `draw(width)` returns, and calls it again when the width changes."""

    DEFAULT_CSS = """
    Lines { height: auto; width: 1fr; }
    """
    _draw: Callable[[int], Sequence[Text]] | None = None
    _drawn = (0, 0)  # width that it was drawn for, number of lines

    def show(self, draw: Callable[[int], Sequence[Text]]) -> None:
        self._draw = draw
        self._redraw(self.size.width)

    def on_resize(self) -> None:
        # Textual can lose a layout request made during a layout; the block would stay one line high.
        self.call_after_refresh(self._fit)

    def _fit(self) -> None:
        if self.size.width != self._drawn[0]:
            self._redraw(self.size.width)

    def _redraw(self, width: int) -> None:
        if self._draw is None or not width:
            return
        lines = [part for line in self._draw(width) for part in _wrap(line, width, self)]
        before, self._drawn = self._drawn, (width, len(lines))
        text = Text("\n", no_wrap=True).join(lines)
        self.update(text, layout=self._drawn[1] != before[1])


def _wrap(line: Text, width: int, widget: Static) -> Sequence[Text]:
    """Wrap a line that is wider than `width`."""
    return list(line.wrap(widget.app.console, width)) if line.cell_len > width else [line]


def cells(values: Sequence[str], widths: Sequence[int]) -> str:
    """Values padded to columns: right-aligned for a positive width, left-aligned for a negative one."""
    return " ".join(f"{v:<{-w}}" if w < 0 else f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
