"""The data screen: rows of any data file with the label mask, how long they are, what is wrong with
them, and edits.
"""

import asyncio
import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget
from textual.widgets import OptionList

from pipeline.errors import UserError
from pipeline.files.home import expand
from pipeline.files.worker import Answer
from pipeline.project.stage_graph import Project
from pipeline.views.data_files import (
    CORRECTIONS,
    DataFile,
    append_row,
    edited_name,
    flat,
    other_file,
    other_files,
    project_files,
    spaced,
    ways_to_train,
)
from tui.dialogs import Menu, PathScreen
from tui.screens.base import WorkbenchScreen
from tui.screens.data.editor import Editor
from tui.screens.data.files_pane import FilesPane
from tui.screens.data.reader import Reader
from tui.screens.data.report import LengthsPane, ProblemsPane
from tui.screens.data.row_view import RowPane
from tui.screens.data.rows import PAGE, RowList, RowsPane
from tui.services.param_edits import follows_params

SMALL_BYTES = 4 * 2**20  # files up to here are checked as soon as they are opened
REST = 0.05  # seconds on a row before it is read: a held key passes over rows
TYPE_A_PATH = "…"
LORA = "finetune_lora.data"
NOTHING = "No data file. Press o to open one."


class DataScreen(WorkbenchScreen):
    """Connects the reading process, the list of rows, the row and the report."""

    NAME: ClassVar[str] = "data"
    CSS_PATH = "data.tcss"
    HELP = """\
What a model is trained on: the rows of a data file, which of their tokens are trained on (green,
in ⟦ ⟧), how long they are and where they are cut, and what is wrong with them.

A file is never changed in place: an edited row is written into a copy, `NAME.edited.jsonl`, and an
answer that was corrected in the chat is appended to a file of its own, `data/corrections.jsonl`.
Both can be put into `params.yaml` from here, so that the next run (`R`) trains on them."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "open_file", "Open a file", id="data.open"),
        Binding("x", "export", "Export", id="data.export"),
        Binding("e", "edit", "Edit the row into a copy", id="data.edit", show=False),
        Binding("m", "measure", "Check and measure all rows", id="data.measure", show=False),
        Binding("n", "problem(1)", "Next problem", id="data.next", show=False),
        Binding("N", "problem(-1)", "Previous problem", id="data.previous", show=False),
        Binding("y", "copy", "Copy the row", id="data.copy", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader(
            self.workbench.root, lambda file: file is self.file, lambda: self.app.is_running
        )
        self._files: dict[str, DataFile] = {}
        self.file: DataFile | None = None
        self.report: Mapping[str, Any] | None = None
        self._row: Answer | None = None  # that is shown
        # row number or position to go to once all rows are counted
        self._goal: tuple[str, int] | None = None

    def body(self) -> Iterable[Widget]:
        with Horizontal():
            with Vertical(id="left"):
                yield FilesPane()
                yield RowsPane(id="rows")
            with Vertical(id="right"):
                yield RowPane()
                with Horizontal(id="report"):
                    yield LengthsPane()
                    yield ProblemsPane()

    def on_mount(self) -> None:
        self.set_focus(self._list)

    async def on_unmount(self) -> None:
        await self.reader.process.stop()

    @property
    def _list(self) -> RowList:
        return self.query_one(RowList)

    @property
    def _project(self) -> Project | None:
        return self.workbench.project_watch.project

    # Files

    def project_changed(self) -> None:
        """List the files again; the one that is shown is read again if its settings or its
        tokenizer changed.
        """
        project = self._project
        own = project_files(project) if project else {}
        self._files = own | {
            name: other_file(project, name) for name in other_files(self.workbench.root, own)
        }
        if self.file and self.file.name not in self._files:
            self._files[self.file.name] = other_file(project, self.file.name)
        self._show_files()
        if self.file is None:
            if first := next(
                iter(sorted(self._files.values(), key=_trains_lora, reverse=True)), None
            ):
                self.open_file(first)
            else:
                self.query_one(RowPane).show_text(NOTHING)
        elif (now := self._files[self.file.name]) != self.file:
            self.open_file(now, ("position", self._list.cursor))

    def _show_files(self) -> None:
        self.query_one(FilesPane).show_files(self._files, self.file.name if self.file else "")

    @on(OptionList.OptionSelected, "#files OptionList")
    def _file_selected(self, event: OptionList.OptionSelected) -> None:
        self.open_file(self._files[str(event.option_id)])
        self.set_focus(self._list)

    @work(group="ask")
    async def action_open_file(self) -> None:
        """Ask for a file."""
        choices = {name: f"{flat(name)}  {file.readers}" for name, file in self._files.items()}
        name = await self.app.push_screen_wait(
            Menu(
                "Open a data file",
                {**choices, TYPE_A_PATH: "another: type its path"},
                self.file.name if self.file else "",
            )
        )
        if name == TYPE_A_PATH:
            name = await self.app.push_screen_wait(
                PathScreen("Data file, folder of save_to_disk, or hub id:")
            )
        if name:
            name = str(expand(name)) if name.startswith("~") else name
            self.open_with(file=name)

    def open_with(self, **request: Any) -> None:
        """`file` and `row` to show; or `add`, a row to train on: {"messages": …} or {"prompt",
        "completion"}.
        """
        if name := request.get("file"):
            known = self._files.get(str(name)) or other_file(self._project, str(name))
            self._files[known.name] = known
            self.open_file(known, ("row", int(request["row"])) if request.get("row") else None)
        if record := request.get("add"):
            self._add(dict(record))

    def unsaved(self) -> str:
        editors = [screen for screen in self.app.screen_stack if isinstance(screen, Editor)]
        return (
            "the row that is being edited" if any(editor.is_changed() for editor in editors) else ""
        )

    def open_file(self, file: DataFile, goal: tuple[str, int] | None = None) -> None:
        """Show a file from its first row on, or at ("row", number), ("position", number)."""
        self.file, self.report, self._row, self._goal = file, None, None, goal
        self.query_one(RowsPane).show_title(title="Rows")
        if self.query_one(RowsPane).filter_text:
            self.query_one(RowsPane).close_filter()
        self._list.reset()
        self._show_files()
        self.query_one(RowPane).show_text("")
        self.query_one(LengthsPane).show_text("m counts the tokens of all rows.")
        self.query_one(ProblemsPane).show_text("m checks all rows.")
        self._index(file)
        self._fetch(0)
        path = self.workbench.root / file.name
        if path.is_file() and path.stat().st_size <= SMALL_BYTES:
            self.action_measure()

    # Reading

    @work(exclusive=True, group="index")
    async def _index(self, file: DataFile) -> None:
        """Count the rows, then go to the one that was asked for."""
        try:
            async with aclosing(self.reader.stream("index", file)) as answers:
                async for answer in answers:
                    if "rows" in answer:
                        self._list.set_total(answer["rows"])
                        more = "" if answer["event"] == "done" else "…"
                        self.query_one(RowsPane).show_title(
                            f"{answer['rows']:,}{more}", title=f"{flat(Path(file.name).name)}"
                        )
            if self._goal is not None:
                (kind, number), self._goal = self._goal, None
                if kind == "row":
                    self._go_to(number)
                    return
                self._list.action_move(number)
            if self._row is None:  # the cursor may not have moved
                self._read_row()
        except UserError as error:
            self.query_one(RowPane).show_text(flat(str(error)))

    @work(exclusive=True, group="page")
    async def _fetch(self, first: int) -> None:
        """Read the rows around the visible ones, then their lengths."""
        if self.file is None:
            return
        try:
            async with aclosing(
                self.reader.stream("page", self.file, first=first, count=PAGE)
            ) as answers:
                async for answer in answers:
                    self._put(answer)
        except UserError as error:
            self.warn(flat(str(error)))

    def _put(self, answer: Answer) -> None:
        if answer["event"] == "page":
            positions = [row["position"] for row in answer["rows"]]
            self._list.put(answer["rows"])
            self._list.set_total(max([self._list.total, *(position + 1 for position in positions)]))
            if self._row is None and self._goal is None:
                self._read_row()
        if "lengths" in answer:
            self._list.put_lengths(answer["lengths"], answer["problems"])

    @on(RowList.Wanted)
    def _rows_wanted(self, event: RowList.Wanted) -> None:
        self._fetch(event.first)

    @on(RowList.Moved)
    def _moved(self) -> None:
        self._read_row()

    @work(exclusive=True, group="row")
    async def _read_row(self) -> None:
        """Show the row under the cursor."""
        position, file = self._list.position, self.file
        if position is None or file is None:
            return
        await asyncio.sleep(REST)
        try:
            async with aclosing(self.reader.stream("row", file, position=position)) as answers:
                async for answer in answers:
                    if answer["event"] in ("row", "done"):
                        self._row = {**answer, "position": position}
                        self.query_one(RowPane).show_row(answer, file.max_length)
        except UserError as error:
            self.query_one(RowPane).show_text(flat(str(error)))

    @work(exclusive=True, group="go")
    async def _go_to(self, number: int, typing: bool = False) -> None:
        """Move to a row by its number; while it is typed, without leaving the field or a word."""
        rows = self.query_one(RowsPane)
        if rows.filter_text and not typing:
            rows.close_filter()
        answer = await self.reader.ask("locate", self.file, row=number) if self.file else None
        if answer and answer["position"] is not None:
            self._list.cursor = answer["position"]
        elif answer and not typing:
            self.warn(f"There is no row {number:,}.")
        if answer and self._row is None:  # the cursor may not have moved
            self._read_row()

    # Search

    @on(RowsPane.Filtered)
    def _search(self, event: RowsPane.Filtered) -> None:
        text = event.text.strip()
        if not text:
            self.workers.cancel_group(self, "find")
            self._list.show_found(None)
            self._show_found("")
        elif text.startswith("#"):
            if text[1:].isdecimal():
                self._list.show_found(None)
                self._go_to(int(text[1:][:12]), typing=True)
        else:
            self._find(text)

    @work(exclusive=True, group="find")
    async def _find(self, text: str) -> None:
        """Show the rows that have `text` in them, as they are found."""
        if self.file is None:
            return
        await asyncio.sleep(REST)
        self._list.show_found([])
        self._show_found("searching …")
        try:
            async with aclosing(self.reader.stream("find", self.file, text=text)) as answers:
                async for answer in answers:
                    self._put(answer)
                    for row in answer["rows"] if answer["event"] == "page" else ():
                        self._list.add_found(row["position"])
                    if answer["event"] == "rows":
                        self._show_found(f"searching … {answer['rows']:,}")
                    if answer["event"] == "done":
                        self._show_found("" if answer["complete"] else "and more")
        except UserError as error:
            self.warn(flat(str(error)))

    def _show_found(self, fact: str) -> None:
        shown, total = self._list.count, self._list.total
        of = f"{shown:,} of {total:,}" if shown != total else f"{total:,}"
        self.query_one(RowsPane).show_title(of, *[fact] * bool(fact))

    # The check

    @work(exclusive=True, group="check")
    async def action_measure(self) -> None:
        """Check all rows, and count their tokens."""
        file = self.file
        if file is None:
            return
        lengths, problems = self.query_one(LengthsPane), self.query_one(ProblemsPane)
        problems.show_text("loading the tokenizer …" if file.base else "checking …")
        lengths.show_text("counting …" if file.base else "")
        try:
            async with aclosing(self.reader.stream("check", file)) as answers:
                async for answer in answers:
                    if answer["event"] == "rows":
                        problems.show_text(f"checking … {answer['rows']:,} rows")
                    elif answer["event"] == "done":
                        self._show_report(answer, file)
        except UserError as error:
            problems.show_text(str(error))
            lengths.show_text("")

    def _show_report(self, report: Answer, file: DataFile) -> None:
        self.report = report
        # errors come first, and a row keeps the first
        rows = [
            (each["row"], each["level"]) for each in report["problems"] if each["row"] is not None
        ]
        self._list.problems = dict(reversed(rows))
        self._list.refresh()
        self.query_one(ProblemsPane).show_report(report)
        if report["tokens"] is None:
            self.query_one(LengthsPane).show_text(
                "No model yet, so tokens are not counted: run import or pretrain."
            )
        else:
            self.query_one(LengthsPane).show_report(report, file)

    @on(ProblemsPane.Chosen)
    def _problem_chosen(self, event: ProblemsPane.Chosen) -> None:
        self._go_to(event.row)

    def action_problem(self, step: int) -> None:
        """Go to the next or the previous row with a problem."""
        numbers = sorted(self._list.known_problems())
        line = self._list.line
        here = line.number if line else 0
        behind = [
            n
            for n in (numbers if step > 0 else reversed(numbers))
            if (n > here if step > 0 else n < here)
        ]
        if behind:
            self._go_to(behind[0])
        else:
            which = "further" if numbers else "known"
            self.warn(f"No {which} problem{'' if self.report else '; m checks all rows'}.")

    # Edits

    @work(group="edit")
    async def action_edit(self) -> None:
        """Edit the row into a copy of the file."""
        file, row = self.file, self._row
        if file is None or row is None:
            return
        if not row["line"]:
            self.warn("The row is too long to be edited here. Edit the file.")
            return
        out = edited_name(file.name)
        again = out == file.name
        changes = (
            f"Row {row['row']:,} of {file.name}, all others as they are, "
            f"{'in it' if again else 'is written to'}:"
        )

        async def write(line: str, out: str) -> Mapping[str, Any]:
            replace = again and out == file.name
            fields = {"position": row["position"], "line": line, "out": out, "replace": replace}
            if answer := await self.reader.ask("copy", file, **fields):
                return answer
            raise UserError("The process that writes the copy has ended.")

        written = await self.app.push_screen_wait(
            Editor(row["line"], out, changes, self._draft_reader(file), write)
        )
        if written is None:
            return
        with self.workbench.errors_shown():
            name, left_out = written.out, written.answer["left_out"]
            left = f" {left_out:,} rows that cannot be read are left out." if left_out else ""
            kept = "" if again else f" {file.name} is as it was."
            self.workbench.log_message(f"Written: {name}, row {row['row']:,} changed.{left}{kept}")
            copy = self._files.get(name) or other_file(self._project, name)
            self._files[copy.name] = copy
            self.open_file(copy, ("position", row["position"]))
            await self._offer_training(name, "" if again else file.name)

    def _draft_reader(self, file: DataFile) -> Any:
        async def read(line: str) -> Mapping[str, Any]:
            return await self.reader.ask("draft", file, line=line) or {
                "problem": "it was not read",
                "turns": [],
            }

        return read

    @work(group="edit")
    async def _add(self, record: dict[str, Any]) -> None:
        """Edit an answer of the chat, and append it to a file of corrections."""
        file = other_file(self._project, CORRECTIONS)
        read = self._draft_reader(file)

        async def write(line: str, out: str) -> Mapping[str, Any]:
            append_row(self.workbench.root / out, out, line)
            return {}

        with self.workbench.errors_shown():
            record = await self._fitting(record, read)
            changes = "This row is appended to a file that the next run can train on:"
            line = json.dumps(record, ensure_ascii=False)
            written = await self.app.push_screen_wait(
                Editor(line, CORRECTIONS, changes, read, write)
            )
            if written is None:
                return
            name = written.out
            self.workbench.log_message(f"Added to {name}.")
            self._files[name] = self._files.get(name) or other_file(self._project, name)
            self.open_file(self._files[name], ("position", sys.maxsize))
            await self._offer_training(name)

    async def _fitting(self, record: dict[str, Any], read: Any) -> dict[str, Any]:
        """The record, for a model without a chat template as prompt and completion."""
        answer = await read(json.dumps(record, ensure_ascii=False))
        messages = record.get("messages")
        if answer.get("template") is False and isinstance(messages, list):
            roles = [message.get("role") for message in messages]
            if roles == ["user", "assistant"]:
                record = {
                    "prompt": str(messages[0]["content"]),
                    "completion": str(messages[1]["content"]),
                }
        return spaced(record)

    async def _offer_training(self, name: str, instead_of: str = "") -> None:
        """Ask which stage shall train on a file, unless one does, and write it to the params."""
        project = self._project
        if project is None or any(
            key.endswith("data") for key in project_files(project).get(name, DataFile("")).uses
        ):
            return
        ways = ways_to_train(project, name, instead_of)
        if not ways:
            return
        how = f"instead of {flat(instead_of)}" if instead_of else "beside its data"
        choices = {**{key: f"{key}: {how}" for key in ways}, "": "nothing, the file is kept"}
        chosen = await self.app.push_screen_wait(
            Menu(f"Which stage trains on {flat(name)}?", choices, LORA)
        )
        if not chosen:
            return
        followed = follows_params(self.workbench.params_path)
        self.workbench.edits.save(self.workbench.params_path, ways[chosen])
        advice = "" if followed else " Add it to dvc.yaml, too: it is not as `lora new` writes it."
        keys = " and ".join(ways[chosen])
        self.workbench.log_message(f"{flat(name)} is in {keys} (z takes it back).{advice}")
        self.workbench.project_watch.look_now()

    @work(group="edit")
    async def action_export(self) -> None:
        """Write all rows in the format of the name asked for."""
        file = self.file
        if file is None:
            return
        question = (
            f"Write the rows of {file.name} to (.jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow):"
        )
        out = await self.app.push_screen_wait(
            PathScreen(question, edited_name(file.name).replace(".edited", ".export"))
        )
        if not out:
            return
        with self.workbench.errors_shown():
            if answer := await self.reader.ask("convert", file, out=out):
                notes = "".join(f" {note}." for note in answer["notes"])
                self.workbench.log_message(
                    flat(f"Written: {out}, {answer['rows']:,} rows of {answer['format']}.{notes}")
                )

    def action_copy(self) -> None:
        """Copy the row as a line of JSON."""
        if self._row and self._row["line"]:
            self.app.copy_to_clipboard(self._row["line"])
            self.workbench.log_message(f"Copied row {self._row['row']:,}.")


def _trains_lora(file: DataFile) -> bool:
    return any(key.startswith(LORA) for key in file.uses)
