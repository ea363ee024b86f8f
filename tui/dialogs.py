"""Dialogs over any screen: a text to read, messages, a question for a path, yes or no, one of
several.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, TypeVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from tui.widgets.table import VIM_KEYS

Severity = Literal["information", "warning", "error"]
STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "information": ""}
MAX_PAGE_BYTES = 2**21  # of a Markdown file that is shown


class Message(NamedTuple):
    """A message and its time."""

    when: datetime
    severity: Severity
    text: str


Frame = TypeVar("Frame", bound=Widget)


def _frame(dialog: Frame, title: str, keys: str) -> Frame:
    """The widget with a title in its border, which is never read as markup, and the keys that end
    the dialog.
    """
    dialog.border_title, dialog.border_subtitle = Text(title), keys
    return dialog


class Reader(ModalScreen[None]):
    """A scrollable text, closed by Escape, q, or a key that a subclass adds: the one that opened
    it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss", "Close"),
        Binding("j", "scroll(1)", "Down", show=False),
        Binding("k", "scroll(-1)", "Up", show=False),
    ]

    def __init__(self, *parts: RenderableType, title: str = "") -> None:
        super().__init__()
        self._parts, self._title = parts, title

    def compose(self) -> ComposeResult:
        yield _frame(
            VerticalScroll(*map(Static, self._parts), classes="dialog"), self._title, "Esc close"
        )

    def action_scroll(self, lines: int) -> None:
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)


class HelpScreen(Reader):
    """The help of the focused pane."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("question_mark,f1", "dismiss", "Close")]


class MessagesScreen(Reader):
    """Lists the messages, which otherwise are shown as toasts only; newest last."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("f12", "dismiss", "Close")]

    def __init__(self, messages: Sequence[Message]) -> None:
        rows = Table.grid(padding=(0, 2))
        for when, severity, text in messages:
            rows.add_row(f"{when:%H:%M:%S}", text, style=STYLES[severity])
        super().__init__(rows if messages else "No messages yet.", title="Messages")


class MarkdownReader(ModalScreen[None]):
    """Shows a Markdown text or file. Its links are not followed: what it says comes from
    elsewhere.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Close")]
    DEFAULT_CSS = """
    MarkdownReader { align: center middle; }
    MarkdownReader > .dialog { width: 96%; max-width: 120; height: 94%; max-height: 94%; }
    """

    def __init__(self, source: str | Path, title: str = "") -> None:
        super().__init__()
        self._source, self._title = (
            source,
            title or (source.name if isinstance(source, Path) else ""),
        )

    def compose(self) -> ComposeResult:
        # with its parser 40 ms, which the first paint should not wait for
        from textual.widgets import Markdown

        yield _frame(
            VerticalScroll(Markdown(self._text(), open_links=False), classes="dialog"),
            self._title,
            "Esc close",
        )

    def on_mount(self) -> None:
        self.set_focus(self.query_one(VerticalScroll))

    def _text(self) -> str:
        if isinstance(self._source, str):
            return self._source
        try:
            with self._source.open(encoding="utf-8", errors="replace") as file:
                return file.read(MAX_PAGE_BYTES)
        except OSError as error:
            return f"{self._source.name} cannot be read: {error.strerror}."


class PathScreen(ModalScreen[str | None]):
    """Returns the typed text without surrounding spaces; None if it is empty or Escape was
    pressed.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question, self._value = question, value

    def compose(self) -> ComposeResult:
        with _frame(Vertical(classes="dialog"), "", "Enter confirm  Esc cancel"):
            yield Static(f"{self._question}\n", markup=False)
            yield Input(self._value, placeholder="a path", select_on_focus=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip() or None)


class Menu(ModalScreen[str | None]):
    """Returns the key of the chosen line; None if Escape was pressed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss(None)", "Close"),
        *VIM_KEYS,
    ]

    def __init__(self, title: str, choices: Mapping[str, str | Text], chosen: str = "") -> None:
        super().__init__()
        self._title, self._choices, self._chosen = title, choices, chosen

    def compose(self) -> ComposeResult:
        with _frame(Vertical(classes="dialog -fit"), self._title, "Enter choose  Esc cancel"):
            options = (Option(text, id=key) for key, text in self._choices.items())
            yield OptionList(*options, compact=True, markup=False)

    def on_mount(self) -> None:
        if self._chosen in self._choices:
            self._list.highlighted = list(self._choices).index(self._chosen)

    @property
    def _list(self) -> OptionList:
        return self.query_one(OptionList)

    def action_cursor_down(self) -> None:
        self._list.action_cursor_down()

    def action_cursor_up(self) -> None:
        self._list.action_cursor_up()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_id)


class Ask(ModalScreen[str]):
    """A question, answered by a letter: returns the letter, or "" for Escape.

    `answers`: letter → what it does, the safest last. Enter does nothing, so that no reflex
    answers.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss('')", "Cancel")]

    def __init__(
        self, question: RenderableType, answers: Mapping[str, str], title: str = ""
    ) -> None:
        super().__init__()
        self._question, self._answers, self._title = question, answers, title

    def compose(self) -> ComposeResult:
        with _frame(VerticalScroll(classes="dialog"), self._title, ""):
            yield Static(self._question, markup=False)
            yield Static()
            for letter, what in {**self._answers, "Esc": "cancel"}.items():
                yield Static(Text.assemble((f"{letter:>4}", "bold"), f"  {what}"))

    def key_escape(self) -> None:
        self.dismiss("")

    def on_key(self, event: object) -> None:
        character = getattr(event, "character", None)
        if character in self._answers:
            self.dismiss(character)
