"""A block of lines that are drawn for the width available. Their styles may name the theme's
variables.
"""

from collections.abc import Callable, Sequence
from typing import Any

from textual.app import RenderResult
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

Lines = Sequence[Content]


class Drawing(Widget):
    """Shows the lines that `draw(width)` returns; those that are wider are wrapped."""

    DEFAULT_CSS = """
    Drawing { height: auto; width: 1fr; }
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._draw: Callable[[int], Lines] = lambda _: ()
        self._drawn = (-1, list[Content]())  # width that it was drawn for, lines

    def show(self, draw: Callable[[int], Lines]) -> None:
        width, before = self._drawn
        self._draw, self._drawn = draw, (-1, [])
        self.refresh(layout=len(self.lines(width)) != len(before))

    def lines(self, width: int) -> Sequence[Content]:
        if self._drawn[0] != width:
            lines = self._draw(width) if width > 0 else []
            wrapped = [
                part
                for line in lines
                for part in (line.wrap(width) if line.cell_length > width else [line])
            ]
            self._drawn = width, wrapped
        return self._drawn[1]

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002  # Textual's names
        return len(self.lines(width))

    def render(self) -> RenderResult:
        return self.content

    @property
    def content(self) -> Content:
        return Content("\n").join(self.lines(self.size.width))
