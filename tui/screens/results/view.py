"""What the four views of the screen have in common."""

from typing import Any

from textual.containers import Horizontal
from textual.content import Content
from textual.widget import Widget

from tui.panes.pane import Pane
from tui.panes.table import Table
from tui.screens.results.about import PANES


class View(Horizontal):
    """A table of what was found, and what its cursor is on.

    It is filled when it is shown, so that a hidden one takes no time.
    """

    table: Table[Any]  # an attribute, as messages can arrive while the screen closes
    found: Any = ""  # what is shown; a text says why there is nothing

    def pane(self, name: str, *content: Widget) -> Pane:
        """A pane of PANES, with its name as id."""
        return Pane(PANES[name], *content, id=name)

    def titled(self, name: str, *facts: Content | str, title: str = "") -> None:
        """Show a pane's title with the facts."""
        self.query_one(f"#{name}", Pane).show_title(*facts, title=title)

    def fill(self, found: Any) -> None:
        """Show what was found, unless it is shown already."""
        if found is self.found:
            return
        self.found, is_empty = found, isinstance(found, str)
        self.set_class(is_empty, "-empty")
        if is_empty:
            self.table.nothing = found
            self.table.show([])
        else:
            self.show_found()

    def show_found(self) -> None:
        """Fill the table."""
        self.table.show(self.found)
