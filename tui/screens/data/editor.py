"""A row is edited: each text of it in a field, or all of it as JSON; what would be written where,
and how it reads.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, Static, TextArea

from pipeline.errors import UserError, explain
from pipeline.views.data_rows import Answer, RowTexts, row_facts
from tui.screens.data.row_view import visible

REST = 0.3  # seconds before what was typed is read
Read = Callable[[str], Awaitable[Answer]]
Write = Callable[[str, str], Awaitable[None]]


class Editor(ModalScreen[str | None]):
    """Returns the file that the edited row was written to; None if it was cancelled. `line`: the
    row, which may be no JSON yet.

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
    CSS_PATH = "editor.tcss"
    KEYS = "Ctrl+S save  Ctrl+O file  Ctrl+T fields or JSON  Tab next field  Esc cancel"

    def __init__(self, line: str, out: str, changes: str, read: Read, write: Write) -> None:
        super().__init__()
        self._changes, self._read, self._write = changes, read, write
        self._row = RowTexts(line, line)
        self._asked = ""  # save or cancel, if its key has to be pressed again
        self.out = Input(out, id="out", compact=True, select_on_focus=False)
        self.reading = Static(id="reading", markup=False)

    def compose(self) -> Iterable[Widget]:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title, dialog.border_subtitle = "Edit the row", self.KEYS
            yield Static(self._changes, markup=False)
            yield self.out
            yield VerticalScroll(*self._widgets(), classes="fields", can_focus=False)
            yield self.reading

    def _widgets(self) -> Iterable[Widget]:
        for name, text in self._row.fields:
            if name:
                yield Static(name, classes="role", markup=False)
            yield TextArea(text, soft_wrap=True, classes="" if name else "json")

    def on_mount(self) -> None:
        self._focus_last()
        self._read_soon()

    def _focus_last(self) -> None:
        """The answer is mostly the last field."""
        field = self.query(TextArea).last()
        self.set_focus(field)
        field.move_cursor(field.document.end)
        self.call_after_refresh(field.scroll_visible, animate=False)

    @property
    def _texts(self) -> list[str]:
        return [area.text for area in self.query(TextArea)]

    def is_changed(self) -> bool:
        """Whether closing it would lose something."""
        return self._row.is_changed(self._texts)

    async def action_as_json(self) -> None:
        """Edit all of the row as JSON, and back."""
        row = self._row
        try:
            line = row.with_texts(self._texts)
        except UserError as error:
            self._say(f"✗ {error}")
            return
        self._row = RowTexts(row.first, line, () not in row.paths)
        fields = self.query_one(".fields")
        # a text area that is painted while it goes has no styles any more
        with self.app.batch_update():
            await fields.remove_children()
            await fields.mount(*self._widgets())
        self._focus_last()

    @on(TextArea.Changed)
    @work(exclusive=True, group="reading")
    async def _read_soon(self) -> None:
        self._asked = ""
        await asyncio.sleep(REST)
        await self._show_reading()

    async def _show_reading(self) -> tuple[str, str] | None:
        """The line and its problem, which is shown; None if it cannot be read."""
        try:
            line = self._row.with_texts(self._texts)
            answer = await self._read(line)
        except UserError as error:
            self._say(f"✗ {error}")
            return None
        problem = visible(answer["problem"])
        if problem:
            self._say(f"✗ {problem}")
        else:
            facts = filter(None, [*row_facts(answer), visible(answer["missing"])])
            self._say(f"✓ {', '.join(facts)}", "$success")
        return line, problem

    def _say(self, text: str, style: str = "$error") -> None:
        self.reading.update(Content.styled(text, style))

    def action_next_field(self, step: int) -> None:
        """The next text, and after the last one the first."""
        if step > 0:
            self.focus_next(TextArea)
        else:
            self.focus_previous(TextArea)

    def action_file(self) -> None:
        self.set_focus(self.out)

    @on(Input.Submitted, "#out")
    @work(exclusive=True, group="reading")
    async def action_save(self) -> None:
        """Save; a row with a problem only when it is asked for twice."""
        read, out = await self._show_reading(), self.out.value.strip()
        if read is None:
            return
        line, problem = read
        if problem and self._asked != "save":
            self._asked = "save"
            self._say(f"✗ {problem} Ctrl+S again writes it all the same.")
            return
        try:
            await self._write(line, out)
        except (UserError, OSError) as error:
            reason = explain(error) if isinstance(error, OSError) else error
            self._say(f"✗ {reason} Nothing was written; Ctrl+O names another file.")
        else:
            self.dismiss(out)

    def action_cancel(self) -> None:
        if self.is_changed() and self._asked != "cancel":
            self._asked = "cancel"
            self._say("Esc again drops what you typed; Ctrl+S saves it.", "$warning")
        else:
            self.dismiss(None)
