"""What the four views of the screen have in common."""

from typing import Any

from textual.containers import Horizontal
from textual.content import Content
from textual.widget import Widget

from pipeline.views.reports import Page, Picture
from tui.panes.pane import Pane
from tui.panes.table import Column, Table
from tui.screens.results.about import PANES
from tui.screens.results.reading import Results


class View(Horizontal):
    """A table, and what its cursor is on. It is filled when it is shown, so that a hidden one takes
    no time.
    """

    table: Table[Any]  # an attribute, as messages can arrive while the screen closes
    results = Results()

    def pane(self, name: str, *content: Widget) -> Pane:
        """A pane of PANES, with its name as id."""
        return Pane(PANES[name], *content, id=name)

    def titled(self, name: str, *facts: Content | str, title: str = "") -> None:
        """Show a pane's title with the facts that are not empty."""
        known = [fact for fact in facts if fact]
        self.query_one(f"#{name}", Pane).show_title(*known, title=title)

    def fill(self, results: Results) -> None:
        """Show results, unless they are shown already."""
        if results is not self.results:
            self.results = results
            self.show_results(results)

    def show_results(self, results: Results) -> None:
        raise NotImplementedError

    def point(self, key: str) -> None:
        """Move the cursor to a row, if it is there."""
        self.table.point(key)


def listed() -> Table[Any]:
    """A table of pages or pictures; those that were not made yet are dim."""
    title = Column[Any]("title", _title, fills=True)
    return Table(key=lambda entry: entry.key, columns=[title], titles=False)


def _title(entry: Page | Picture) -> Content:
    return Content.styled(entry.title, "" if entry.path else "$foreground-muted")
