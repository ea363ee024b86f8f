"""A widget that is lines of text, as wide as it is given room."""

from collections.abc import Callable, Sequence

from rich.text import Text
from textual.widgets import Static


class Lines(Static):
    """Shows what `drawn(width)` returns, and draws it anew when the width changes."""

    DEFAULT_CSS = """
    Lines { height: auto; width: 1fr; }
    """
    _draw: Callable[[int], Sequence[Text]] | None = None
    _drawn = (0, 0)  # width that it was drawn for, lines

    def show(self, draw: Callable[[int], Sequence[Text]]) -> None:
        self._draw = draw
        self._redraw(self.size.width)

    def on_resize(self) -> None:
        # Textual can lose a wish for another layout while it lays out: the first lines would stay one line high.
        self.call_after_refresh(self._fit)

    def _fit(self) -> None:
        if self.size.width != self._drawn[0]:
            self._redraw(self.size.width)

    def _redraw(self, width: int) -> None:
        if self._draw is None or not width:
            return
        lines = [part for line in self._draw(width) for part in _wrapped(line, width, self)]
        before, self._drawn = self._drawn, (width, len(lines))
        text = Text("\n", no_wrap=True).join(lines)
        self.update(text, layout=self._drawn[1] != before[1])


def _wrapped(line: Text, width: int, widget: Static) -> Sequence[Text]:
    """Nothing is cut: what is too long goes on below."""
    return list(line.wrap(widget.app.console, width)) if line.cell_len > width else [line]


def cells(values: Sequence[str], widths: Sequence[int]) -> str:
    """The first value to the left, numbers to the right; a negative width is to the left too."""
    return " ".join(f"{v:<{-w}}" if w < 0 else f"{v:>{w}}" for v, w in zip(values, widths, strict=True))
