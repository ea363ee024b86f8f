"""The reports that the stages wrote, each as a page."""

from collections.abc import Iterable

from textual import on
from textual.content import Content
from textual.widget import Widget

from pipeline.errors import UserError
from pipeline.views.reports import Page, read_page
from tui.panes.markdown import markdown
from tui.panes.pane import Pane
from tui.panes.table import Table
from tui.panes.text import Text
from tui.screens.results.reading import Results
from tui.screens.results.view import View, listed


class ReportsView(View):
    def __init__(self) -> None:
        super().__init__(id="report-view")
        self.table, self.page = listed(), Text(wide=True)

    def compose(self) -> Iterable[Widget]:
        yield self.pane("reports", self.table)
        yield self.pane("report", self.page)

    def show_results(self, results: Results) -> None:
        self.table.show(results.pages)
        if not results.pages:
            self.page.show("No report yet. Press R to run the pipeline.")

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        page, variables = event.row, self.app.theme_variables
        again = self.query_one("#report", Pane).title == page.title

        def draw(width: int) -> Iterable[Content]:
            return markdown(_text(page), variables)(width)

        self.page.show(draw, again=again, slowly=True)
        self.titled("report", page.about, title=page.title)

    @on(Table.Opened)
    def opened(self) -> None:
        self.screen.set_focus(self.page)


def _text(page: Page) -> str:
    if page.path is None:
        return f"{page.title} was not measured yet. Press R to run what is left."
    try:
        return read_page(page.path)
    except UserError as error:
        return str(error)
