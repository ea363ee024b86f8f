"""Cells that are drawn and written one by one, and read as rows of styled text."""

from collections.abc import Iterable
from itertools import groupby
from unicodedata import normalize

from rich.cells import cell_len
from textual.content import Content

BLANK = (" ", "")
HALF = ""  # the right half of a wide character


class Canvas:
    """`width` × `height` cells. What is drawn last is seen; texts stay whole."""

    left = top = 0  # of a part, in the whole

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._cells: dict[tuple[int, int], tuple[str, str]] = {}
        self._texts = set[tuple[int, int]]()  # the cells of texts

    def part(self, left: int, top: int, width: int, height: int) -> "Canvas":
        """Some of its cells as a canvas of their own."""
        part = Canvas(width, height)
        part.left, part.top = left, top
        part._cells, part._texts = self._cells, self._texts
        return part

    def put(self, x: float, y: float, char: str, style: str) -> None:
        """Draw a character that is a cell wide; at NaN it is nowhere."""
        if 0 <= x < self.width and 0 <= y < self.height:
            cell = self.left + int(x), self.top + int(y)
            if cell not in self._texts:
                self._cells[cell] = char, style

    def write(self, x: int, y: int, text: str, style: str) -> None:
        """Characters without a width, such as controls, are left out."""
        for char in normalize("NFC", text):
            wide = cell_len(char)
            if self.is_free(x, y, wide):
                for number, part in enumerate((char, HALF)[:wide]):
                    cell = self.left + x + number, self.top + y
                    self._cells[cell] = part, style
                    self._texts.add(cell)
            x += wide

    def write_free(
        self, choices: Iterable[tuple[int, int, str]], style: str, margin: int = 1
    ) -> None:
        """Write the first text that no other is in the way of: x, y and the text.

        A margin on each side stays empty, so that two texts do not read as one.
        """
        for x, y, text in choices:
            if self.is_free(x, y, cell_len(text), margin):
                self.write(x, y, text, style)
                return

    def is_free(self, x: int, y: int, width: int, margin: int = 0) -> bool:
        """Whether no text is there, nor in `margin` cells on each side."""
        inside = 0 <= y < self.height and 0 <= x <= self.width - width
        around = range(self.left + x - margin, self.left + x + width + margin)
        return inside and all((at, self.top + y) not in self._texts for at in around)

    def rows(self) -> list[Content]:
        rows = []
        for y in range(self.height):
            cells = [self._cells.get((x, y), BLANK) for x in range(self.width)]
            runs = groupby(cells, key=lambda cell: cell[1])
            parts = [("".join(char for char, _ in run), style) for style, run in runs]
            rows.append(Content.assemble(*parts))
        return rows
