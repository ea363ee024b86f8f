"""Cells that are written one by one and read as rows of styled text."""

from itertools import groupby
from unicodedata import normalize

from rich.cells import cell_len
from textual.content import Content

BLANK = (" ", "")
HALF = ("", "")  # the right half of a wide character


class Canvas:
    """`width` × `height` cells: the last that is written is seen."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._cells: dict[tuple[int, int], tuple[str, str]] = {}

    def put(self, x: int, y: int, char: str, style: str) -> None:
        """Write a character that is a cell wide: a plot writes thousands."""
        if 0 <= x < self.width and 0 <= y < self.height:
            self._clear_halves(x, y, 1)
            self._cells[x, y] = char, style

    def write(self, x: int, y: int, text: str, style: str) -> None:
        """Characters without a width, such as controls, are left out."""
        for char in normalize("NFC", text):
            wide = cell_len(char)
            if wide and 0 <= y < self.height and 0 <= x <= self.width - wide:
                self._clear_halves(x, y, wide)
                self._cells[x, y] = char, style
                if wide == 2:
                    self._cells[x + 1, y] = HALF
            x += wide

    def _clear_halves(self, x: int, y: int, wide: int) -> None:
        """Blank what is left of wide characters of which a part is written over."""
        if self._cells.get((x, y)) == HALF:
            self._cells[x - 1, y] = BLANK
        if self._cells.get((x + wide, y)) == HALF:
            self._cells[x + wide, y] = BLANK

    def free(self, x: int, y: int, width: int, margin: int = 0) -> bool:
        """Whether nothing is written there, nor in `margin` cells on each side."""
        inside = 0 <= y < self.height and 0 <= x <= self.width - width
        around = range(x - margin, x + width + margin)
        return inside and not any((at, y) in self._cells for at in around)

    def rows(self) -> list[Content]:
        rows = []
        for y in range(self.height):
            cells = [self._cells.get((x, y), BLANK) for x in range(self.width)]
            runs = groupby(cells, key=lambda cell: cell[1])
            parts = [("".join(char for char, _ in run), style) for style, run in runs]
            rows.append(Content.assemble(*parts))
        return rows
