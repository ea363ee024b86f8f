"""A Markdown text in lines: laid out once in a thread, of which only the visible lines are drawn.

Textual's own Markdown makes a widget of each table cell, of which a report has thousands.
"""

import io
import re
from typing import Any, ClassVar

from rich.console import Console
from rich.markdown import Heading, Markdown, TableElement
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.theme import Theme
from textual import work
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

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
            cells = [
                [Measurement.get(console, wide, cell) for cell in (c.header, *c.cells)]
                for c in columns
            ]
            least, most = (
                [max(getattr(m, name) for m in each) for each in cells]
                for name in ("minimum", "maximum")
            )
            room = options.max_width - sum(least) - 2 * len(columns) - 1
            wanted = [high - low for low, high in zip(least, most, strict=True)]
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


def lay_out(text: str, width: int, variables: dict[str, str]) -> list[list[Segment]]:
    """The lines of a Markdown text in the theme's colours. Pictures are named, with the key that
    shows them.
    """
    muted, accent = (
        Style.parse(_color(variables, "text-muted")),
        Style.parse(f"bold {variables['accent']}"),
    )
    styles = {
        **{f"markdown.h{level}": accent + Style(underline=level == 1) for level in range(1, 7)},
        **dict.fromkeys(("markdown.code", "markdown.table.header"), Style(bold=True)),
        **dict.fromkeys(("markdown.table.border", "markdown.hr", "markdown.block_quote"), muted),
        **dict.fromkeys(("markdown.link", "markdown.link_url"), Style(underline=True)),
        **dict.fromkeys(("markdown.item.bullet", "markdown.item.number"), accent),
    }
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        color_system="truecolor",
        theme=Theme(styles),
    )
    page = _Page(PICTURE.sub(r"*▣ \g<title> (f shows it)*", text), hyperlinks=False)
    return list(Segment.split_lines(console.render(page)))


def _color(variables: dict[str, str], name: str) -> str:
    """A theme variable as a style; those that blend, such as `auto 60%`, as what rich has for
    it.
    """
    value = variables.get(name, "")
    return value if value.startswith("#") and len(value) == 7 else "dim"


class MarkdownPage(ScrollView, can_focus=True):
    """Shows a page. `find` marks the lines that contain a text, and `n` goes from one to the
    next.
    """

    DEFAULT_CSS = """
    MarkdownPage { height: 1fr; background: transparent; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", "Down", show=False),
        Binding("k", "scroll_up", "Up", show=False),
        Binding("g", "scroll_home", "First line", show=False),
        Binding("G", "scroll_end", "Last line", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("n", "next_match", "Next place that is searched", show=False),
    ]

    def __init__(self, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self._text = ""
        self._lines: list[Strip] = []
        self._plain: list[str] = []
        self._laid_out: tuple[object, ...] = ()
        self._wanted = ""
        self.matches: list[int] = []

    @property
    def plain(self) -> str:
        """What is shown, without styles."""
        return "\n".join(self._plain)

    def on_mount(self) -> None:
        self.app.theme_changed_signal.subscribe(self, lambda _: self._lay_out())

    def on_resize(self) -> None:
        self._lay_out()

    def show(self, text: str) -> None:
        """Show another page, from its first line."""
        if text != self._text:
            self._text = text
            self.scroll_to(0, 0, animate=False)
            self._lay_out()

    def find(self, text: str) -> None:
        """Mark the lines that contain `text`, and go to the first from here on."""
        self._wanted = text.casefold()
        self._mark()
        if self.matches:
            here = self.scroll_offset.y
            self._go(next((line for line in self.matches if line >= here), self.matches[0]))
        self.refresh()

    def action_page(self, pages: int) -> None:
        """Move by pages at once: drawn in between, each picture costs as much as the last."""
        self.scroll_relative(y=pages * self.size.height, animate=False)

    def action_next_match(self) -> None:
        if self.matches:
            self._go(
                next(
                    (line for line in self.matches if line > self.scroll_offset.y), self.matches[0]
                )
            )

    def _go(self, line: int) -> None:
        self.scroll_to(y=line, animate=False, force=True)

    def _mark(self) -> None:
        wanted = self._wanted
        self.matches = (
            [n for n, line in enumerate(self._plain) if wanted in line.casefold()] if wanted else []
        )

    def _lay_out(self) -> None:
        width = max(self.size.width - 2, LEAST_WIDTH)  # room for the scroll bar
        now = self._text, width, self.app.theme
        if now != self._laid_out and self.size.width:
            self._laid_out = now
            self._render_lines(self._text, width, self.app.theme_variables)

    @work(thread=True, exclusive=True, group="page")
    def _render_lines(self, text: str, width: int, variables: dict[str, str]) -> None:
        lines = [Strip(line) for line in lay_out(text, width, variables)]
        self.app.call_from_thread(self._show_lines, text, lines)

    def _show_lines(self, text: str, lines: list[Strip]) -> None:
        if text != self._text:
            return
        self._lines, self._plain = lines, [strip.text for strip in lines]
        self._mark()
        self.virtual_size = Size(max((strip.cell_length for strip in lines), default=0), len(lines))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        x, top = self.scroll_offset
        number, width = y + top, self.size.width
        if number >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        line = (
            self._lines[number]
            .crop_extend(x, x + width, self.rich_style)
            .apply_style(self.rich_style)
        )
        return line.apply_style(Style(reverse=True)) if number in self.matches else line
