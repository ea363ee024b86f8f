"""A row is edited: each text of it in a field, or all of it as JSON; what would be written where,
and how it reads.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Input, Static, TextArea

from pipeline.errors import UserError, explain
from tui.screens.data.row_view import visible

MAX_FIELDS = 40  # more texts are edited as JSON
DELAY = 0.3  # seconds of rest before what was typed is read
CONTENTS = ("content", "value")  # the text of a turn
Path = tuple[str | int, ...]
Read = Callable[[str], Awaitable[Mapping[str, Any]]]
Write = Callable[[str, str], Awaitable[Mapping[str, Any]]]


class Written(NamedTuple):
    """The file that the row was written to, and what the writer answered."""

    out: str
    answer: Mapping[str, Any]


def text_fields(record: Mapping[str, Any]) -> dict[Path, str]:
    """Where the texts of a row are that one edits → what they are; nothing if there are too many,
    or none.
    """
    fields: dict[Path, str] = {}
    for key, value in record.items():
        if isinstance(value, str):
            fields[(key,)] = key
        for number, turn in enumerate(value if isinstance(value, list) else ()):
            texts = [
                name
                for name in CONTENTS
                if isinstance(turn, dict) and isinstance(turn.get(name), str)
            ]
            fields |= {
                (key, number, name): str(turn.get("role") or turn.get("from") or key)
                for name in texts
            }
    return fields if len(fields) <= MAX_FIELDS else {}


def get(record: Any, path: Path) -> str:
    for key in path:
        record = record[key]
    return str(record)


def put(record: Any, path: Path, text: str) -> None:
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = text


class Editor(ModalScreen[Written | None]):
    """Returns where the edited row was written; None if it was cancelled. `line`: the row, which
    may be no JSON yet.

    `read` says how a line would be read from the file. `write` writes a line to a file of this
    name, or raises UserError or OSError: the dialog then says so and stays, with what was typed.
    `changes`: what is written besides the row, in words.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save"),
        Binding("ctrl+t", "as_json", "Fields or JSON"),
        # Tab leaves out the file's name: after the last text, where the cursor begins, what is
        # typed belongs to a text.
        Binding("tab", "next_field(1)", "Next field"),
        Binding("shift+tab", "next_field(-1)", "Previous field"),
        Binding("ctrl+o", "file", "File"),
        Binding("escape", "cancel", "Cancel"),
    ]
    CSS = """
    Editor { align: center middle; }
    Editor > .dialog { width: 96%; max-width: 130; height: 94%; max-height: 94%; padding: 0 1; }
    Editor .fields { height: 1fr; }
    Editor TextArea { height: auto; max-height: 14; padding: 0; border: none; border-left: wide $foreground 25%; }
    Editor TextArea:focus { border: none; border-left: wide $accent; }
    Editor #out { margin-bottom: 1; }
    Editor .json { height: 1fr; max-height: 100%; }
    Editor Static { height: auto; }
    Editor .role { color: $text-muted; }
    Editor #reading { max-height: 3; }
    """

    def __init__(self, line: str, out: str, changes: str, read: Read, write: Write) -> None:
        super().__init__()
        self._line, self._out, self._changes, self._read, self._write = (
            line,
            out,
            changes,
            read,
            write,
        )
        self._record: Any = _loaded(line)
        self._fields = text_fields(self._record) if isinstance(self._record, dict) else {}
        self._rest: Timer | None = None
        self._first = line
        self._asked = ""  # the action that was asked to be confirmed by its key: save or cancel

    def compose(self) -> ComposeResult:
        dialog = Vertical(classes="dialog")
        dialog.border_title = "Edit the row"
        dialog.border_subtitle = (
            "Ctrl+S save  Ctrl+O file  Ctrl+T fields or JSON  Tab next field  Esc cancel"
        )
        with dialog:
            yield Static(self._changes, markup=False)
            yield Input(self._out, id="out", compact=True, select_on_focus=False)
            yield VerticalScroll(*self._widgets(), classes="fields", can_focus=False)
            yield Static(id="reading", markup=False)

    def _widgets(self) -> Iterable[Widget]:
        if not self._fields:
            yield TextArea(
                _pretty(self._line), classes="json", soft_wrap=True, show_line_numbers=False
            )
            return
        for path, label in self._fields.items():
            yield Static(label, classes="role", markup=False)
            yield TextArea(get(self._record, path), soft_wrap=True, show_line_numbers=False)

    def on_mount(self) -> None:
        self._focus_last()
        self._read_soon()

    def _focus_last(self) -> None:
        """The answer is mostly the last field."""
        field = self.query(TextArea).last()
        self.set_focus(field)
        field.move_cursor(field.document.end)
        self.call_after_refresh(field.scroll_visible, animate=False)

    def line(self) -> str:
        """The row as it stands in the fields. Raises UserError if it is no JSON object."""
        texts = [area.text for area in self.query(TextArea)]
        if self._fields:
            for path, text in zip(self._fields, texts, strict=True):
                put(self._record, path, text)
            return json.dumps(self._record, ensure_ascii=False)
        try:
            record = json.loads(texts[0])
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {error}. Correct it.") from None
        if not isinstance(record, dict):
            raise UserError('must be a JSON object, such as {"text": …}.')
        return json.dumps(record, ensure_ascii=False)

    async def action_as_json(self) -> None:
        """Edit all of the row as JSON, and back."""
        try:
            line = self.line()
        except UserError as error:
            self._say(f"✗ {error}", "error")
            return
        self._line, self._record = line, json.loads(line)
        self._fields = {} if self._fields else text_fields(self._record)
        fields = self.query_one(".fields")
        # a text area that is painted while it goes has no styles any more
        with self.app.batch_update():
            await fields.remove_children()
            await fields.mount(*self._widgets())
        self._focus_last()

    @on(TextArea.Changed)
    def _typed(self) -> None:
        self._asked = ""
        self._read_soon()

    def _read_soon(self) -> None:
        if self._rest:
            self._rest.stop()
        self._rest = self.set_timer(DELAY, self._show_reading)

    @work(exclusive=True, group="reading")
    async def _show_reading(self) -> None:
        await self._reading()

    async def _reading(self) -> tuple[str, Mapping[str, Any]] | None:
        """The line and how it reads, which is shown; None if it does not."""
        try:
            line = self.line()
            answer = await self._read(line)
        except UserError as error:
            self._say(f"✗ {error}", "error")
            return None
        if answer["problem"]:
            self._say(f"✗ {visible(answer['problem'])}", "error")
        elif answer.get("tokens") is None:
            self._say(f"✓ it can be read; no tokens: {visible(answer['missing'])}", "success")
        else:
            cut = f", {answer['cut']:,} cut" if answer["cut"] else ""
            self._say(
                f"✓ {answer['tokens']:,} tokens, {answer['trained']:,} trained on{cut}", "success"
            )
        return line, answer

    def _say(self, text: str, color: str) -> None:
        if self.app.is_running:
            self.query_one("#reading", Static).update(Text(text, self.app.theme_variables[color]))

    @on(Input.Submitted, "#out")
    def _submitted(self) -> None:
        self.action_save()

    def action_next_field(self, step: int) -> None:
        """The next text, and after the last one the first; from the file's name the first or the
        last.
        """
        areas = [*self.query(TextArea)]
        here = next((n for n, area in enumerate(areas) if area.has_focus), -1 if step > 0 else 0)
        self.set_focus(areas[(here + step) % len(areas)])

    def action_file(self) -> None:
        self.set_focus(self.query_one("#out", Input))

    @work(exclusive=True, group="reading")
    async def action_save(self) -> None:
        """Save; a row with a problem only when it is asked for twice."""
        read = await self._reading()
        if read is None:
            return
        line, answer = read
        out = self.query_one("#out", Input).value.strip()
        if not out:
            self._say("✗ The file has no name. Ctrl+O names one.", "error")
            return
        if answer["problem"] and self._asked != "save":
            self._asked = "save"
            self._say(
                f"✗ {visible(answer['problem'])} Ctrl+S again writes it all the same.", "error"
            )
            return
        try:
            written = await self._write(line, out)
        except (UserError, OSError) as error:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            self._say(f"✗ {reason} Nothing was written; Ctrl+O names another file.", "error")
            return
        self.dismiss(Written(out, written))

    def action_cancel(self) -> None:
        if self.is_changed() and self._asked != "cancel":
            self._asked = "cancel"
            self._say("Esc again drops what you typed; Ctrl+S saves it.", "warning")
            return
        self.dismiss(None)

    def is_changed(self) -> bool:
        """Whether closing it would lose something."""
        try:
            return bool(json.loads(self.line()) != _loaded(self._first))
        except UserError:
            return self.query(TextArea).last().text != _pretty(self._first)


def _loaded(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _pretty(line: str) -> str:
    record = _loaded(line)
    return line.rstrip("\n") if record is None else json.dumps(record, ensure_ascii=False, indent=2)
