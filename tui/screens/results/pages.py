"""Reports: a list, and the page that its cursor is on."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import OptionList

from pipeline.errors import UserError
from pipeline.views.reports import Page, Picture, read_page
from tui.widgets.markdown_page import MarkdownPage
from tui.widgets.pane import Pane
from tui.widgets.table import VIM_KEYS
from tui.widgets.text import KeyedList


class PageReader(ModalScreen[None]):
    """A page over the screen, of any length."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Close")]
    DEFAULT_CSS = """
    PageReader { align: center middle; }
    PageReader > MarkdownPage { width: 96%; max-width: 140; height: 94%; max-height: 94%; }
    """

    def __init__(self, text: str, title: str) -> None:
        super().__init__()
        self._text, self._title = text, title

    def compose(self) -> Iterable[Widget]:
        page = MarkdownPage(classes="dialog")
        page.border_title, page.border_subtitle = Text(self._title), "Esc close"
        yield page

    def on_mount(self) -> None:
        self.query_one(MarkdownPage).show(self._text)


class VimList(KeyedList):
    """A list that is moved in like every other."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *VIM_KEYS,
        Binding("g", "first", "First", show=False),
        Binding("G", "last", "Last", show=False),
    ]


class ListPane(Pane):
    """The pages or pictures that there are; those that were not made yet are dim."""

    DEFAULT_CSS = """
    ListPane > VimList { height: 1fr; background: transparent; text-wrap: nowrap; text-overflow: ellipsis; }
    """
    FILTER = True

    class Pointed(Message):
        """The cursor is on another entry, or Enter was pressed on it."""

        def __init__(self, pane: "ListPane", key: str, entered: bool) -> None:
            super().__init__()
            self.pane, self.key, self.entered = pane, key, entered

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._entries: dict[str, Text] = {}

    def contents(self) -> Iterable[Widget]:
        yield VimList(markup=False)

    @property
    def list(self) -> VimList:
        return self.query_one(VimList)

    def show(self, entries: Sequence[Page | Picture]) -> None:
        """List pages or pictures."""
        self._entries = {
            entry.key: Text(entry.title, "" if entry.path else "dim") for entry in entries
        }
        self._fill()

    def _fill(self) -> None:
        wanted = self.filter_text.casefold()
        self.list.show(
            {key: text for key, text in self._entries.items() if wanted in text.plain.casefold()}
        )

    def filtered(self, text: str) -> None:  # noqa: ARG002  # name given by Pane
        self._fill()

    def point(self, key: str) -> None:
        """Move the cursor to an entry."""
        with_key = [n for n, option in enumerate(self.list.options) if option.id == key]
        if with_key:
            self.list.highlighted = with_key[0]

    @on(OptionList.OptionHighlighted)
    @on(OptionList.OptionSelected)
    def _pointed(self, event: OptionList.OptionHighlighted | OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(
            self.Pointed(self, str(event.option_id), isinstance(event, OptionList.OptionSelected))
        )


class PagePane(Pane):
    """A report as text. The filter searches it."""

    TITLE = "Report"
    HELP = """\
The report that a stage wrote, as text. Arrows, j k, PgUp PgDn, g G move in it.

- `/` searches: lines with what is typed are in reverse, and the page moves to the first; `n` moves to the next.
- `▣` stands where the page has a picture: `f` shows it.
"""
    FILTER = True

    def contents(self) -> Iterable[Widget]:
        yield MarkdownPage()

    @property
    def page(self) -> MarkdownPage:
        return self.query_one(MarkdownPage)

    def show(self, page: Page | None, otherwise: str) -> None:
        """Show a page, or a sentence where it was not made yet."""
        if page is None or page.path is None:
            self.page.show(otherwise)
        else:
            try:
                self.page.show(read_page(page.path))
            except UserError as error:
                self.page.show(str(error))
        self.show_title(
            *([page.about] if page and page.about else []), title=page.title if page else self.TITLE
        )

    def filtered(self, text: str) -> None:
        self.page.find(text)


class PagesView(Horizontal):
    """A list of pages at the left, the page at the right. In a narrow terminal Enter enlarges the
    page.
    """

    # as Textual names them
    def __init__(self, title: str, nothing: str, help: str, id: str) -> None:
        super().__init__(id=id)
        self._title, self._nothing, self._help = title, nothing, help
        self._pages: dict[str, Page] = {}

    def compose(self) -> Iterable[Widget]:
        yield ListPane(title=self._title, help=self._help)
        yield PagePane()

    def show(self, pages: Sequence[Page]) -> None:
        before, self._pages = self._pages, {page.key: page for page in pages}
        self.query_one(ListPane).show(pages)
        if not before or not pages:
            self._show_page(pages[0].key if pages else "")

    def point(self, key: str) -> None:
        """Show the page of this key."""
        self.query_one(ListPane).point(key)
        self._show_page(key)

    @property
    def folder(self) -> str:
        """The output folder of the shown page's stage, such as studies/rank."""
        option = self.query_one(ListPane).list.highlighted_option
        page = self._pages.get(str(option.id)) if option else None
        return page.folder if page else ""

    def refresh_page(self) -> None:
        """Read the shown page again: its stage may have run."""
        option = self.query_one(ListPane).list.highlighted_option
        self._show_page(str(option.id) if option else "")

    def _show_page(self, key: str) -> None:
        page = self._pages.get(key)
        missing = (
            f"{page.title} was not measured yet. Press R to run what is left."
            if page
            else self._nothing
        )
        self.query_one(PagePane).show(page, missing)

    @on(ListPane.Pointed)
    def _pointed(self, event: ListPane.Pointed) -> None:
        event.stop()
        self._show_page(event.key)
        if event.entered:
            self.screen.set_focus(self.query_one(MarkdownPage))
