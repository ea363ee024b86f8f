"""A framed part of a screen, with its title, its keys in the border, help, and a field that filters
what is in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from textual import on
from textual.binding import Binding, BindingsMap
from textual.containers import Vertical
from textual.content import Content
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import Input

from tui.panes.lines import FromPane


@dataclass(frozen=True)
class About:
    """What a pane says of itself: its title, its help in Markdown, its keys.

    The border shows the keys with `show`, as far as they fit. `filters`: `/` narrows or searches
    what is in it, and the border calls that so.
    """

    title: str
    help: str = ""
    keys: Sequence[Binding] = ()
    filters: str = ""


class FilterField(Input):
    """What is typed narrows what is in the pane; Enter keeps it, Esc ends it."""

    BINDINGS: ClassVar[list[Any]] = [
        Binding("enter", "submit", "keep the filter", id="filter.keep"),
        Binding("escape", "screen.leave", "all again", id="filter.end"),
    ]

    def __init__(self) -> None:
        super().__init__(placeholder="filter", compact=True, classes="filter")


class Pane(Vertical):
    """A frame around widgets. The filter goes to the first that has a method `filter`, or to whoever
    handles `Filtered`.
    """

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

    @dataclass
    class Filtered(FromPane):
        """What the pane is narrowed to has changed, and nothing in it has a filter of its own."""

        text: str

    def __init__(
        self,
        about: About,
        *content: Widget,
        id: str | None = None,  # as Textual names them
        classes: str | None = None,
    ) -> None:
        super().__init__(*content, id=id, classes=classes)
        self.about, self.title = about, about.title
        self._bindings = BindingsMap.merge([self._bindings, BindingsMap(about.keys)])
        self.filter_field = FilterField() if about.filters else None
        self._before_filter: Widget | None = None
        self.actions_in_border: set[str] = set()
        self._facts: Sequence[Content | str] = ()
        self._title_shown = Content()

    def compose(self) -> Iterable[Widget]:
        if self.filter_field:
            yield self.filter_field

    def on_mount(self) -> None:
        self.show_title(*self._facts)

    def on_resize(self, _: Resize) -> None:
        self.show_keys()

    # The border

    def show_keys(self) -> None:
        """Show the keys in the border, as many as its width holds."""
        keys = [
            (binding.action, self.app.get_key_display(binding), binding.description.lower())
            for binding in self.about.keys
            if binding.show
        ]
        if self.filter_field:
            keys.append(("filter", "/", self.about.filters))
        line, before, self.actions_in_border = Content(), self.actions_in_border, set()
        for action, key, label in keys:
            shown = Content.assemble("  " * bool(line), (key, "bold"), f" {label}")
            if line.cell_length + shown.cell_length > self.size.width - 4:
                break
            line += shown
            self.actions_in_border.add(action)
        self.border_subtitle = line
        if self.actions_in_border != before:
            self.screen.refresh_bindings()  # the line at the bottom leaves them out

    def show_title(self, *facts: Content | str, title: str = "") -> None:
        """Show the title, and after it the facts that are not empty: `Runs  3 of 9`."""
        self.title, self._facts = title or self.title, facts
        parts = [Content(self.title)]
        for fact in (fact for fact in facts if fact):
            parts.append(Content.styled(fact, "not bold") if isinstance(fact, str) else fact)
        if self.filter_text:
            parts.append(Content.styled(f"/{self.filter_text}", "not bold"))
        text = Content("  ").join(parts)
        if not text.is_same(self._title_shown):  # setting it draws the whole pane again
            self._title_shown = self.border_title = text

    # Filter

    @property
    def filter_text(self) -> str:
        """What the pane is narrowed to; "" for all."""
        return self.filter_field.value if self.filter_field else ""

    def open_filter(self) -> None:
        """Open the field, and remember where the focus was."""
        field, focused = self.filter_field, self.screen.focused
        if field is None:
            return
        if focused is not field:
            self._before_filter = focused
        field.add_class("-open")
        self.app.stylesheet.update(self.screen)  # keys already typed are meant for the field
        self.screen.set_focus(field)

    def close_filter(self) -> None:
        """Show everything again."""
        if self.filter_field:
            self.filter_field.value = ""
            self._leave_filter(self.filter_field)

    def _leave_filter(self, field: FilterField) -> None:
        field.set_class(bool(field.value), "-open")
        before = self._before_filter
        if field.has_focus:
            self.screen.set_focus(before if before and before.is_attached else self.first_focus())

    def first_focus(self) -> Widget | None:
        """The widget that gets the focus when the pane does."""
        if self.can_focus:
            return self
        widgets = (w for w in self.query("*").results(Widget) if w is not self.filter_field)
        return next((widget for widget in widgets if widget.focusable), None)

    @on(Input.Changed, ".filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        event.stop()
        filters = (getattr(each, "filter", None) for each in (self, *self.children))
        if narrow := next(filter(None, filters), None):
            narrow(event.value)
        else:
            self.post_message(self.Filtered(self, event.value))
        self.show_title(*self._facts)

    @on(Input.Submitted, ".filter")
    def _filter_kept(self, event: Input.Submitted) -> None:
        event.stop()
        if self.filter_field:
            self._leave_filter(self.filter_field)
