"""A figure that is ready to be written: how it is drawn, what it shows, and the numbers that it is drawn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.document.figures.draw.style import PRINT
from pipeline.document.studies.shared.report import REPORT, Figure, save
from pipeline.document.tables import Table

PICTURES = (".png", ".svg")
LONGEST = 20  # rows of a table that the report repeats; the rest is for who reads the file


@dataclass(frozen=True)
class RenderedFigure:
    """`place`: in the document, such as "Figure 1, §2". `shows`: in one line, with its main measured number.

    `caption`: paragraphs of Markdown, with what was measured in words. `size`: inches.
    """

    name: str
    place: str
    title: str
    shows: str
    caption: str
    tables: Sequence[Table]
    draw: Callable[[Figure], None]
    size: tuple[float, float]

    @property
    def files(self) -> list[str]:
        return [*(f"{self.name}{ending}" for ending in PICTURES), *(f"{table.name}.csv" for table in self.tables)]

    def write(self, folder: Path) -> None:
        """Both pictures, and each table as CSV."""
        for table in self.tables:
            table.write(folder)
        save(folder / self.name, self.draw, self.size, PICTURES, PRINT)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"place": self.place, "title": self.title, "shows": self.shows, "files": self.files}

    def section(self) -> str:
        """Its part of the report: picture, caption, the tables that are short."""
        short = [table for table in self.tables if len(table.rows) <= LONGEST]
        long = [f"`{table.name}.csv`" for table in self.tables if table not in short]
        parts = [
            f"## {self.title} ({self.place})\n",
            f"![{self.title}]({self.name}.png)\n",
            self.caption.strip() + "\n",
            *(f"**{table.title}**\n\n{table.markdown()}" for table in short),
            *([f"Also drawn from {', '.join(long)}.\n"] if long else []),
        ]
        return "\n".join(parts)


def write_report(folder: Path, drawn: Sequence[RenderedFigure]) -> None:
    """report.md, with every figure in the document's order."""
    head = "# Figures, from what was trained and measured\n"
    (folder / REPORT).write_text("\n".join([head, *(one.section() for one in drawn)]), encoding="utf-8")
