"""Cells that are written one by one and read as rows of styled text."""

from itertools import groupby

from rich.cells import cell_len
from textual.content import Content


class Canvas:
    """`width` × `height` cells: the last that is written is seen."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._cells: dict[tuple[int, int], tuple[str, str]] = {}

    def write(self, x: int, y: int, text: str, style: str) -> None:
        for char in text:
            wide = max(cell_len(char), 1)
            if 0 <= y < self.height and x >= 0 and x + wide <= self.width:
                self._cells[x, y] = char, style
                if wide == 2:
                    self._cells[x + 1, y] = "", style
            x += wide

    def free(self, x: int, y: int, width: int) -> bool:
        """Whether nothing is written there."""
        inside = 0 <= y < self.height and x >= 0 and x + width <= self.width
        return inside and not any((at, y) in self._cells for at in range(x, x + width))

    def rows(self) -> list[Content]:
        rows = []
        for y in range(self.height):
            cells = [self._cells.get((x, y), (" ", "")) for x in range(self.width)]
            runs = groupby(cells, key=lambda cell: cell[1])
            parts = [("".join(char for char, _ in run), style) for style, run in runs]
            rows.append(Content.assemble(*parts))
        return rows
