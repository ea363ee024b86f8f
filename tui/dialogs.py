"""Dialogs over any screen: a text to read, messages, a question for a text, yes or no, one of
several.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, Static

from pipeline.files.home import expand
from tui.panes.text import Draw, Text

Severity = Literal["information", "warning", "error"]
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
    dialog.border_title, dialog.border_subtitle = Content(title), keys
    return dialog


class Reader(ModalScreen[str | None]):
    """A page over the screen, of any length: Markdown, or what draws lines. A click on a link may
    dismiss it with a text.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,f1,f12", "dismiss", "Close")  # also what opened it
    ]
    DEFAULT_CSS = """
    Reader { align: center middle; }
    Reader > Text { width: 96%; max-width: 140; height: 94%; max-height: 94%; }
    """

    def __init__(self, page: str | Draw, title: str) -> None:
        super().__init__()
        self._page, self._title = page, title
        self.page = Text(wide=True)

    def compose(self) -> ComposeResult:
        self.page.add_class("dialog")
        yield _frame(self.page, self._title, "Esc close")

    def on_mount(self) -> None:
        from tui.panes.markdown import markdown  # 30 ms, which the first paint should not wait for

        page = self._page
        draw = markdown(page, self.app.theme_variables) if isinstance(page, str) else page
        self.page.show(draw, slowly=True)


def draw_messages(messages: Sequence[Message], _: int) -> Iterator[Content]:
    """The messages, which otherwise are shown as toasts only; newest last."""
    for when, severity, text in messages:
        style = "" if severity == "information" else f"${severity}"
        yield Content.styled(f"{when:%H:%M:%S}  {text}", style)
    if not messages:
        yield Content("No messages yet.")


def read_page(path: Path) -> str:
    """The text of a Markdown file, or why it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MAX_PAGE_BYTES)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}."


class AskText(ModalScreen[str | None]):
    """A question, answered by a text, such as a path: returns it without surrounding spaces, or
    None if it is empty or Escape was pressed.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question, self._value = question, value

    def compose(self) -> ComposeResult:
        with _frame(Vertical(classes="dialog"), "", "Enter confirm  Esc cancel"):
            yield Static(f"{self._question}\n", markup=False)
            yield Input(self._value, select_on_focus=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip() or None)


class Ask(ModalScreen[str]):
    """A question, answered by a letter: returns the letter, or "" for Escape.

    `answers`: letter → what it does, the safest last. Enter does nothing, so that no reflex
    answers.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss('')", "Cancel")]

    def __init__(
        self, question: Content | str, answers: Mapping[str, str], title: str = ""
    ) -> None:
        super().__init__()
        self._question, self._answers, self._title = question, answers, title

    def compose(self) -> ComposeResult:
        with _frame(VerticalScroll(classes="dialog"), self._title, ""):
            yield Static(self._question, markup=False)
            yield Static()
            for letter, what in {**self._answers, "Esc": "cancel"}.items():
                yield Static(Content.assemble((f"{letter:>4}", "bold"), f"  {what}"))

    def on_key(self, event: object) -> None:
        character = getattr(event, "character", None)
        if character in self._answers:
            self.dismiss(character)


async def ask_file(
    workbench: Any, question: str, default: str, check: Callable[[Path], object] = lambda _: None
) -> Path | None:
    """Ask where to write, and whether to replace what is there; None if the user does not want to.

    Call it in a worker. Raises OSError, and what `check` raises of the path.
    """
    name = await workbench.push_screen_wait(AskText(question, default))
    if name is None:
        return None
    path: Path = workbench.root / expand(name)
    check(path)
    ask = Ask(f"{path} exists.", {"y": "replace it"}, "Save")
    if path.exists() and not await workbench.push_screen_wait(ask):
        return None
    return path
