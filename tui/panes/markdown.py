"""A Markdown text as lines in the theme's colours.

Textual's own Markdown makes a widget of each table cell, of which a report has thousands.
"""

import io
import re
from typing import Any

from rich.console import Console
from rich.markdown import Heading, Markdown, TableElement
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.theme import Theme
from textual.content import Content
from textual.style import Style as ContentStyle

from tui.panes.text import Draw

LEAST_WIDTH = 50  # cells; in a narrower pane the page is moved sideways
MAX_WIDTH = 2000  # cells of a table; what is wider is cut
PICTURE = re.compile(r"!\[(?P<title>[^]]*)\]\((?P<file>[^)\s]*)[^)]*\)")


class _Heading(Heading):
    """Left-aligned: rich draws a frame around the first, which takes three lines."""

    def __rich_console__(self, console: Any, options: Any) -> Any:  # names given by rich
        self.text.justify = "left"
        yield self.text


class _Table(TableElement):
    """A column is as wide as its longest word, even if the page must be moved sideways: a number
    that is cut is wrong.

    What room is left goes to the columns with the longest texts.
    """

    def __rich_console__(self, console: Any, options: Any) -> Any:  # names given by rich
        wide = options.update(width=MAX_WIDTH)
        for table in super().__rich_console__(console, options):
            columns = table.columns  # type: ignore[union-attr]  # it is a Table
            least, wanted = [], []
            for column in columns:
                cells = (column.header, *column.cells)
                measures = [Measurement.get(console, wide, cell) for cell in cells]
                least.append(max(measure.minimum for measure in measures))
                wanted.append(max(measure.maximum for measure in measures) - least[-1])
            room = options.max_width - sum(least) - 2 * len(columns) - 1
            share = min(max(room, 0) / max(sum(wanted), 1), 1.0)
            for column, low, more in zip(columns, least, wanted, strict=True):
                column.width = low + int(more * share)
            yield from console.render(table, wide)


class _Page(Markdown):
    elements = {  # noqa: RUF012  # as rich declares it
        **Markdown.elements,
        "heading_open": _Heading,
        "table_open": _Table,
    }


def markdown(text: str, variables: dict[str, str], least_width: int = LEAST_WIDTH) -> Draw:
    """What draws a Markdown text. Pictures are named, with the key that shows them."""
    page = PICTURE.sub(r"*▣ \g<title> (f shows it)*", text)
    styles = _styles(variables)

    def draw(width: int) -> list[Content]:
        console = Console(
            file=io.StringIO(),
            width=max(width, least_width),
            force_terminal=True,
            color_system="truecolor",
            theme=Theme(styles),
        )
        lines = Segment.split_lines(console.render(_Page(page, hyperlinks=False)))
        return [_content(line) for line in lines]

    return draw


def _styles(variables: dict[str, str]) -> dict[str, Style]:
    muted = Style.parse(_color(variables, "text-muted"))
    accent = Style.parse(f"bold {variables['accent']}")
    return {
        **{f"markdown.h{level}": accent + Style(underline=level == 1) for level in range(1, 7)},
        **dict.fromkeys(("markdown.code", "markdown.table.header"), Style(bold=True)),
        **dict.fromkeys(("markdown.table.border", "markdown.hr", "markdown.block_quote"), muted),
        **dict.fromkeys(("markdown.link", "markdown.link_url"), Style(underline=True)),
        **dict.fromkeys(("markdown.item.bullet", "markdown.item.number"), accent),
    }


def _color(variables: dict[str, str], name: str) -> str:
    """A theme variable as a style; those that blend, such as `auto 60%`, as what rich has for
    it.
    """
    value = variables.get(name, "")
    return value if value.startswith("#") and len(value) == 7 else "dim"


def _content(line: list[Segment]) -> Content:
    parts = []
    for text, style, _ in line:
        parts.append((text, ContentStyle.from_rich_style(style) if style else ""))
    return Content.assemble(*parts).rstrip()
