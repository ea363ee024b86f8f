"""A scrolled list of lines of any length, of which only those that are seen are drawn."""

from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Resize
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip
from textual.style import Style
from textual.visual import Visual
from textual.widget import Widget

# In a stylesheet it is $text-muted, which a Content would draw in white.
MUTED = "$foreground-muted"


MOVE_KEYS: tuple[BindingType, ...] = (
    Binding("down,j", "move(1)", "Down", show=False),
    Binding("up,k", "move(-1)", "Up", show=False),
    Binding("pagedown", "page(1)", "Page down", show=False),
    Binding("pageup", "page(-1)", "Page up", show=False),
    Binding("home,g", "first", "First", show=False),
    Binding("end,G", "last", "Last", show=False),
)


@dataclass
class FromPane(Message):
    """A message that `on` chooses by the widget that it is from."""

    widget: Widget

    @property
    def control(self) -> Widget:
        return self.widget


class Lines(ScrollView, can_focus=True):
    """Subclasses implement `line`, `lay_out` and `action_move`, and call `redraw` when lines look
    otherwise.

    With `head_height` 1 the line `head` stays at the top.
    """

    auto_links = False  # no line has one, and what they look like is costly to find out

    DEFAULT_CSS = """
    Lines {
        height: 1fr; background: transparent; scrollbar-size-vertical: 1; text-wrap: nowrap;
        & > .lines--head { color: $text-muted; text-style: bold; }
        & > .lines--cursor { background: $block-cursor-blurred-background; }
        &:focus > .lines--cursor { background: $block-cursor-background; color: $block-cursor-foreground; }
    }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"lines--head", "lines--cursor"}
    BINDINGS: ClassVar[list[BindingType]] = [*MOVE_KEYS]
    head_height = 0

    def __init__(self, *, name: str | None = None, id: str | None = None) -> None:
        super().__init__(name=name, id=id)
        # row of the widget → its text and component class when it was drawn
        self._looks: dict[int, tuple[Content, str]] = {}

    def lay_out(self) -> None:
        """Find the lines for the width that there is, and call `set_size`."""
        raise NotImplementedError

    def on_resize(self, _: Resize) -> None:
        self.lay_out()

    def watch_show_vertical_scrollbar(self, is_shown: bool) -> None:
        """A scroll bar takes a column, of which no resize tells."""
        if is_shown:
            self.lay_out()

    def line(self, number: int) -> Content:
        """The line of this number, counted from 0; it is cut to the width."""
        raise NotImplementedError

    def head(self) -> Content:
        """The line that stays at the top."""
        return Content("")

    def line_class(self, number: int) -> str:  # noqa: ARG002  # for subclasses
        """The component class of a line; "" for the style of the widget."""
        return ""

    @property
    def line_count(self) -> int:
        return self.virtual_size.height - self.head_height

    @property
    def plain(self) -> str:
        """All lines, without styles."""
        return "\n".join(self.line(number).plain for number in range(self.line_count))

    @property
    def width(self) -> int:
        """Cells of a line that are seen."""
        return self.scrollable_content_region.width

    @property
    def page_height(self) -> int:
        """Lines that are seen, the head not counted."""
        return max(self.scrollable_content_region.height - self.head_height, 1)

    def set_size(self, width: int, lines: int) -> None:
        """There are so many lines, of at most `width` cells."""
        size = Size(width, lines + self.head_height)
        if size != self.virtual_size:
            if self.styles.auto_dimensions:
                self.virtual_size = size
            else:  # only the scroll bars move, so the screen needs no layout
                self.set_reactive(Lines.virtual_size, size)
            self._scroll_update(size)
        self.redraw()

    def redraw(self) -> None:
        """Draw those lines again that look otherwise than before: of a table mostly one."""
        for y, (content, name) in self._looks.items():
            if y < self.size.height:
                now, name_now = self._look(y)
                if name != name_now or not content.is_same(now):
                    self.refresh(Region(0, y, self.size.width, 1))

    def show_line(self, number: int, lines: int = 1) -> None:
        """Scroll until a line, and as many after it, are seen."""
        top, height = round(self.scroll_offset.y), self.page_height
        wanted = min(max(top, number + lines - height), number)
        if wanted != top and self.scrollable_content_region.height:
            self.scroll_to(y=wanted, animate=False, force=True)

    def action_move(self, by: int) -> None:
        """Move by so many lines."""
        raise NotImplementedError

    def action_page(self, by: int) -> None:
        self.action_move(by * max(self.page_height - 1, 1))

    def action_first(self) -> None:
        self.action_move(-self.line_count)

    def action_last(self) -> None:
        self.action_move(self.line_count)

    def refresh_number(self, number: int) -> None:
        """Draw a line again."""
        self.refresh_line(number + self.head_height)

    def render_line(self, y: int) -> Strip:
        x, width = self.scroll_offset.x, max(self.size.width, self.virtual_size.width)
        content, name = self._looks[y] = self._look(y)
        style: Style = self.get_visual_style(name) if name else self.visual_style
        number = self._line_at(y)
        if number >= self.line_count:
            return Strip.blank(self.size.width, style.rich_style)
        strip = Strip.blank(width, style.rich_style)
        if content:
            strip, *_ = Visual.to_strips(
                self, content, width, 1, style, apply_selection=False, pad=True
            )
        return strip.apply_offsets(0, number).crop(x, x + self.size.width)

    def _line_at(self, y: int) -> int:
        """The line in a row of the widget, which there may not be."""
        return y + round(self.scroll_offset.y) - self.head_height

    def _look(self, y: int) -> tuple[Content, str]:
        """The text in a row of the widget, and its component class."""
        number = self._line_at(y)
        if y < self.head_height:
            return self.head(), "lines--head"
        if number < self.line_count:
            return self._selected(number), self.line_class(number)
        return Content(), ""

    def _selected(self, number: int) -> Content:
        """The line, with the part that the mouse selected."""
        content = self.line(number)
        span = self.text_selection.get_span(number) if self.text_selection else None
        if span is None:
            return content
        start, end = span
        style = Style.from_styles(self.screen.get_component_styles("screen--selection"))
        return content.stylize(style, start, len(content) if end == -1 else end)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that the mouse selected; the other lines are not drawn for it."""
        first = selection.start.y if selection.start else 0
        last = selection.end.y if selection.end else self.line_count - 1
        texts = []
        for number in range(first, min(last + 1, self.line_count)):
            start, end = selection.get_span(number) or (0, 0)
            plain = self.line(number).plain
            texts.append(plain[start : len(plain) if end == -1 else end])
        return "\n".join(texts), "\n"


def wrapped(line: Content, width: int) -> list[Content]:
    """A line in lines of at most `width` cells, or of 2 where it is less."""
    line = line.expand_tabs()
    return [line] if line.cell_length <= width else line.wrap(width)
