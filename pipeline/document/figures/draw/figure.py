"""A rendered figure of the document: its drawing function, its texts and the tables it is drawn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.document.figures.draw.style import PRINT
from pipeline.document.studies.shared.report import REPORT, Figure, save
from pipeline.document.tables import Table

PICTURES = (".png", ".svg")
MAX_REPORT_ROWS = 20  # longer tables are only in their CSV file


@dataclass(frozen=True)
class RenderedFigure:
    """`place`: in the document, such as "Figure 1, §2". `shows`: one line with the main result.

    `caption`: paragraphs of Markdown that describe the measurements. `size`: width and height in inches.
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
        """Write the PNG, the SVG, and each table as CSV."""
        for table in self.tables:
            table.write(folder)
        save(folder / self.name, self.draw, self.size, PICTURES, PRINT)

    def facts(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {"place": self.place, "title": self.title, "shows": self.shows, "files": self.files}

    def section(self) -> str:
        """Its section of the report: picture, caption and the short tables."""
        short = [table for table in self.tables if len(table.rows) <= MAX_REPORT_ROWS]
        long = [f"`{table.name}.csv`" for table in self.tables if table not in short]
        parts = [
            f"## {self.title} ({self.place})\n",
            f"![{self.title}]({self.name}.png)\n",
            self.caption.strip() + "\n",
            *(f"**{table.title}**\n\n{table.markdown()}" for table in short),
            *([f"Further data: {', '.join(long)}.\n"] if long else []),
        ]
        return "\n".join(parts)


def write_report(folder: Path, drawn: Sequence[RenderedFigure]) -> None:
    """Write report.md with the figures in the document's order."""
    head = "# Figures, drawn from this project's artifacts\n"
    (folder / REPORT).write_text("\n".join([head, *(figure.section() for figure in drawn)]), encoding="utf-8")
