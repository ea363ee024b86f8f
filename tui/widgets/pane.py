"""A pane that is declared as a class, until its screen is made of those in `tui/panes`."""

from collections.abc import Iterable
from typing import ClassVar

from rich.text import Text
from textual.content import Content
from textual.events import Resize
from textual.widget import Widget

from tui.panes.pane import About, FilterField
from tui.panes.pane import Pane as FramedPane

__all__ = ["FilterField", "Pane"]


class Pane(FramedPane):
    """Subclasses set TITLE, HELP and BINDINGS, and FILTER with `filtered` if they have a list to
    narrow.
    """

    TITLE: ClassVar[str] = ""
    HELP: ClassVar[str] = ""
    FILTER: ClassVar[bool] = False

    def __init__(
        self,
        *children: Widget,
        title: str = "",
        help: str = "",  # its name everywhere
        id: str | None = None,  # as Textual names it
        classes: str | None = None,
    ) -> None:
        about = About(title or self.TITLE, help or self.HELP, (), "filter" * self.FILTER)
        super().__init__(about, *children, id=id, classes=classes)
        self.help = about.help

    def compose(self) -> Iterable[Widget]:
        yield from self.contents()
        yield from super().compose()

    def contents(self) -> Iterable[Widget]:
        """The widgets of a subclass that does not get them as children."""
        return ()

    def on_mount(self) -> None:
        self.show_title()

    def on_resize(self, event: Resize) -> None:  # noqa: ARG002  # name given by Textual
        self.show_keys()

    def show_title(self, *facts: Content | str | Text, title: str = "") -> None:
        parts = [Content.from_rich_text(fact) if isinstance(fact, Text) else fact for fact in facts]
        super().show_title(*parts, title=title)

    def _keys(self) -> Iterable[tuple[str, str, str]]:
        yield from self.shown_keys()

    def shown_keys(self) -> list[tuple[str, str, str]]:
        """Action, key and label of the bindings that the border shows."""
        rows = {}
        for bindings in self._bindings.key_to_bindings.values():
            for binding in bindings:
                if binding.show and binding.action not in rows:
                    key = self.app.get_key_display(binding)
                    rows[binding.action] = (binding.action, key, binding.description.lower())
        return list(rows.values()) + [("filter", "/", "filter")] * self.FILTER

    def filtered(self, text: str) -> None:
        """Narrow the list to what contains `text`."""

    def filter(self, text: str) -> None:
        self.filtered(text)

    def first_focusable(self) -> Widget | None:
        return self.first_focus()
