"""Data: the rows of any data file with the label mask, how long they are, what is wrong with them,
and edits.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from textual import on, work
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget

from pipeline.data.columns import parse_columns
from pipeline.files.home import expand
from pipeline.project.stage_graph import Project
from pipeline.views.data_files import (
    CORRECTIONS,
    DataFile,
    flat,
    other_file,
    other_files,
    project_files,
)
from tui.dialogs import AskText
from tui.panes.table import Column, Table
from tui.screens.base import WorkbenchScreen
from tui.screens.data import about
from tui.screens.data.editor import Editor
from tui.screens.data.edits import LORA, add_row, edit_row, export_rows, offer_training
from tui.screens.data.reader import Reader
from tui.screens.data.report import Report
from tui.screens.data.row_view import RowPane
from tui.screens.data.rows import RowsPane

SMALL_BYTES = 4 * 2**20  # files up to here are checked as soon as they are opened
NOTHING = "No data file. Press o to open one."


class DataScreen(WorkbenchScreen):
    """Files, and what the reading process says of the one that is open."""

    NAME = "data"
    CSS_PATH = "data.tcss"
    AUTO_FOCUS = "#rows Table"
    PANES = about.PANES
    HELP = """\
What a model is trained on: the rows of a data file, which of their tokens are trained on (green,
in ⟦ ⟧), how long they are and where they are cut, and what is wrong with them.

A file is never changed in place: an edited row is written into a copy, `NAME.edited.jsonl`, and an
answer that was corrected in the chat is appended to a file of its own, `data/corrections.jsonl`.
Both can be put into `params.yaml` from here, so that the next run (`R`) trains on them.
"""
    BINDINGS = about.BINDINGS

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader(self.workbench.root)
        self.known: dict[str, DataFile] = {}  # by name
        # They are attributes, as messages can arrive while the screen closes.
        column = Column[DataFile]("file", self._file_line, fills=True)
        self.files = Table[DataFile](key=lambda file: file.name, columns=[column], titles=False)
        self.row = RowPane(self.reader)
        self.rows = RowsPane(self.reader, self.row.say)
        self.report = Report(self.reader, self.rows.mark)

    def body(self) -> Iterable[Widget]:
        with Horizontal():
            with Vertical(id="left"):
                yield self.pane("files", self.files)
                yield self.rows
            with Vertical(id="right"):
                yield self.row
                yield self.report

    async def on_unmount(self) -> None:
        await self.reader.process.stop()

    @property
    def _project(self) -> Project | None:
        return self.workbench.project_watch.project

    # Files

    def project_changed(self) -> None:
        """List the files again; the one that is shown is read again if its settings or its
        tokenizer changed.
        """
        project, shown = self._project, self.reader.file
        own = project_files(project) if project else {}
        others = [*other_files(self.workbench.root, own), *filter(None, [shown.name])]
        self.known = own | {name: self._other_file(name) for name in others if name not in own}
        if shown.name:
            if self._file(shown.name) != shown:
                self._open(self._file(shown.name), self.rows.position)
        elif self.known:
            self._open(max(self.known.values(), key=_trains_lora))
        else:
            self.row.say(NOTHING)
        self.files.show([*self.known.values()])

    def _file(self, name: str) -> DataFile:
        """The file of this name, which is listed from now on."""
        return self.known.setdefault(name, self._other_file(name))

    def _other_file(self, name: str) -> DataFile:
        """A file that nothing reads, with the columns that the user said."""
        file = other_file(self._project, name)
        return replace(file, columns=self.known.get(name, file).columns)

    def _file_line(self, file: DataFile) -> Content:
        is_shown, name = file == self.reader.file, flat(file.name.removeprefix("data/"))
        style = "" if file.uses else "dim"
        readers = (f"  {file.readers}", "dim")
        return Content.assemble("● " if is_shown else "  ", (name, style), readers)

    def _open(self, file: DataFile, position: int = 0, number: int = 0) -> None:
        """Show a file, at the row of this number, or else at this position."""
        self.reader.file = file
        self.files.show([*self.known.values()])
        self.files.point(file.name)
        self.row.say("")
        self.report.say("m checks all rows.", "m counts the tokens of all rows.")
        self.rows.open(position, number)
        path = self.workbench.root / file.name
        if path.is_file() and path.stat().st_size <= SMALL_BYTES:
            self.report.measure()

    @on(Table.Opened, "#files Table")
    def _file_chosen(self, event: Table.Opened) -> None:
        self._open(event.row)
        self.set_focus(self.rows.table)

    @work(group="ask")
    async def action_open_file(self) -> None:
        """Ask for a file."""
        question = "Data file, folder of save_to_disk, or hub id:"
        if name := await self.app.push_screen_wait(AskText(question)):
            self.open_with(file=str(expand(name)))

    @work(group="ask")
    async def action_columns(self) -> None:
        """Ask which columns of a file that nothing reads are which."""
        file = self.reader.file
        if not file.name or file.uses:
            self.warn("Choose a file that no stage reads; of the others params.yaml says it.")
            return
        question = f"Columns of {flat(file.name)}, such as prompt=question, completion=answer:"
        before = ", ".join(f"{key}={column}" for key, column in file.columns.items())
        text = await self.app.push_screen_wait(AskText(question, before))
        with self.workbench.errors_shown():
            if text is not None:
                self.known[file.name] = replace(file, columns=parse_columns(text))
                self._open(self.known[file.name])

    def open_with(self, **request: Any) -> None:
        """`file` and `row` to show; or `add`, a row to train on: {"messages": …} or {"prompt",
        "completion"}.
        """
        if "file" in request:
            self._open(self._file(request["file"]), number=request.get("row", 0))
        if "add" in request:
            self._add(request["add"])

    # Rows and problems

    @on(Table.Pointed, "#rows Table")
    def _row_pointed(self) -> None:
        if line := self.rows.table.pointed:
            self.row.read(line.position)

    @on(Table.Opened, "#problems Table")
    def _problem_chosen(self, event: Table.Opened) -> None:
        if event.row.row is not None:
            self.rows.go_to(event.row.row)

    def action_problem(self, step: int) -> None:
        """Go to the next or the previous row with a problem."""
        line, numbers = self.rows.table.pointed, self.rows.problem_numbers()
        here = line.number if line else 0
        ahead = [number for number in numbers if (number - here) * step > 0]
        if ahead:
            self.rows.go_to(min(ahead) if step > 0 else max(ahead))
        else:
            self.warn("No further problem is known; m checks all rows.")

    def action_measure(self) -> None:
        """Check all rows, and count their tokens."""
        if self.reader.file.name:
            self.report.measure()

    def action_copy(self) -> None:
        """Copy the row as a line of JSON."""
        row = self.row.row
        if row and row["line"]:
            self.app.copy_to_clipboard(row["line"])
            self.workbench.log_message(f"Copied row {row['row']:,}.")

    # Edits

    def unsaved(self) -> str:
        for screen in self.app.screen_stack:
            if isinstance(screen, Editor) and screen.is_changed():
                return "the row that is being edited"
        return ""

    @work(group="edit")
    async def action_edit(self) -> None:
        """Edit the row into a copy of the file."""
        row = self.row.row
        if row and not row["line"]:
            self.warn("The row is too long to be edited here. Edit the file.")
        elif row:
            with self.workbench.errors_shown():
                name = self.reader.file.name
                out = await edit_row(self.workbench, self.reader, row)
                await self._take(out, row["position"], "" if out == name else name)

    @work(group="edit")
    async def _add(self, record: dict[str, Any]) -> None:
        """Edit an answer of the chat, and append it to a file of corrections."""
        file = other_file(self._project, CORRECTIONS)
        with self.workbench.errors_shown():
            out = await add_row(self.workbench, self.reader, file, record)
            await self._take(out, sys.maxsize)

    async def _take(self, out: str | None, position: int, instead_of: str = "") -> None:
        """Open the file that a row was written to, and offer to train on it."""
        if out:
            self._open(self._file(out), position)
        if out and self._project:
            await offer_training(self.workbench, self._project, out, instead_of)

    @work(group="edit")
    async def action_export(self) -> None:
        """Write all rows in the format of the name asked for."""
        if self.reader.file.name:
            with self.workbench.errors_shown():
                await export_rows(self.workbench, self.reader)


def _trains_lora(file: DataFile) -> bool:
    return any(key.startswith(LORA) for key in file.uses)
