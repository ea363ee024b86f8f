"""A framed part of a screen, with its title, its keys in the border, help, and a field that filters
its list.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import on
from textual.binding import Binding
from textual.containers import Vertical
from textual.events import DescendantFocus, Resize
from textual.widget import Widget
from textual.widgets import Input


class FilterField(Input):
    """What is typed narrows the list of its pane; Enter keeps it, Esc ends it."""

    BINDINGS: ClassVar[list[Any]] = [
        Binding("enter", "submit", "keep the filter", id="filter.keep"),
        Binding("escape", "screen.leave", "all again", id="filter.end"),
    ]

    def __init__(self) -> None:
        super().__init__(placeholder="filter", compact=True, classes="filter")


class Pane(Vertical):
    """Subclasses set TITLE, HELP and BINDINGS, and FILTER with `filtered` if they have a list to
    narrow.

    The border shows the bindings with `show`, as far as they fit. `?` shows HELP (Markdown) while
    the focus is inside.
    """

    TITLE: ClassVar[str] = ""
    HELP: ClassVar[str] = ""
    FILTER: ClassVar[bool] = False
    ALLOW_MAXIMIZE = True
    DEFAULT_CSS = """
    Pane {
        height: 1fr; border: round $foreground 25%; padding: 0 1;
        border-title-color: $text; border-title-style: bold; border-subtitle-color: $text-muted;
        &:focus-within, &:focus { border: round $accent; border-title-color: $accent; }
        .filter { display: none; dock: bottom; background: $boost; }
        .filter.-open { display: block; }
    }
    """

    def __init__(
        self,
        *children: Widget,
        title: str = "",
        help: str = "",  # its name everywhere
        id: str | None = None,  # as Textual names it
        classes: str | None = None,
    ) -> None:
        super().__init__(*children, id=id, classes=classes)
        self.title, self.help = title or self.TITLE, help or self.HELP
        self._before_filter: Widget | None = None
        self.actions_in_border: set[str] = set()
        self._title_text = Text()

    def compose(self) -> Iterable[Widget]:
        yield from self.contents()
        if self.FILTER:
            yield FilterField()

    def contents(self) -> Iterable[Widget]:
        """The widgets of a subclass that does not get them as children."""
        return ()

    def on_mount(self) -> None:
        self.show_title()

    def on_resize(self, event: Resize) -> None:  # noqa: ARG002  # name given by Textual
        self.show_keys()

    def show_keys(self) -> None:
        """Show the keys in the border, as many as its width holds."""
        line, room, before = Text(no_wrap=True), self.size.width - 2, self.actions_in_border
        self.actions_in_border = set()
        for action, keys, label in self.shown_keys():
            if cell_len(line.plain) + cell_len(f"{keys} {label}") + 2 > room:
                break
            line.append("  " if line else "").append(keys, "bold").append(f" {label}")
            self.actions_in_border.add(action)
        self.border_subtitle = line
        if self.actions_in_border != before:
            self.screen.refresh_bindings()  # the line at the bottom leaves them out

    def show_title(self, *facts: str | Text, title: str = "") -> None:
        """Show the title, and facts after it, which may be styled: `Runs  3 of 9`."""
        self.title = title or self.title
        text = Text(self.title, no_wrap=True, overflow="ellipsis")
        for fact in facts:
            text.append("  ").append_text(
                fact if isinstance(fact, Text) else Text(fact, "not bold")
            )
        if self.FILTER and self.filter_text:
            text.append(f"  /{self.filter_text}", "not bold")
        if text != self._title_text:  # setting it draws the whole pane again
            self._title_text = self.border_title = text

    def shown_keys(self) -> list[tuple[str, str, str]]:
        """Action, key and label of the bindings that the border shows."""
        rows = {}
        for bindings in self._bindings.key_to_bindings.values():
            for binding in bindings:
                if binding.show and binding.action not in rows:
                    key = self.app.get_key_display(binding)
                    rows[binding.action] = (binding.action, key, binding.description.lower())
        return list(rows.values()) + [("filter", "/", "filter")] * self.FILTER

    # Filter

    @property
    def filter_text(self) -> str:
        """What the list is narrowed to; "" for all."""
        return self._field.value if self.FILTER and self.is_mounted else ""

    @property
    def _field(self) -> FilterField:
        return self.query_one(FilterField)

    def filtered(self, text: str) -> None:
        """Narrow the list to what contains `text`."""

    def open_filter(self) -> None:
        """Open the field, and remember where the focus was."""
        focused = self.screen.focused
        if focused is not self._field:
            self._before_filter = focused
        self._field.add_class("-open")
        self.app.stylesheet.update(self.screen)  # keys already typed are meant for the field
        self.screen.set_focus(self._field)

    def close_filter(self) -> None:
        """Show everything again."""
        self._field.value = ""
        self._leave_filter()

    def _leave_filter(self) -> None:
        self._field.set_class(bool(self._field.value), "-open")
        before = self._before_filter
        if self._field.has_focus:
            self.screen.set_focus(
                before if before and before.is_attached else self.first_focusable()
            )

    def first_focusable(self) -> Widget | None:
        """The widget that gets the focus when the pane does."""
        if self.can_focus:
            return self
        return next(
            (
                w
                for w in self.query("*").results(Widget)
                if w.focusable and w is not self._maybe_field()
            ),
            None,
        )

    def _maybe_field(self) -> Widget | None:
        return self._field if self.FILTER else None

    @on(Input.Changed, ".filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.filtered(event.value)
        self.show_title()

    @on(Input.Submitted, ".filter")
    def _filter_kept(self, event: Input.Submitted) -> None:
        event.stop()
        self._leave_filter()

    def on_descendant_focus(self, event: DescendantFocus) -> None:  # noqa: ARG002  # name given by Textual
        self.show_keys()
