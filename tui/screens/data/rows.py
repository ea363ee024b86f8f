"""The pane of a file's rows: read as they are seen, searched, with the signs of problems."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from textual.content import Content

from pipeline.views.data_files import flat
from pipeline.views.data_rows import PAGE, Answer, FileRows, RowLine
from tui.panes.pane import Pane
from tui.panes.table import LEAST, Column, Table
from tui.screens.data.about import ROWS
from tui.screens.data.reader import Reader

REST = 0.05  # seconds before what was typed is searched
SIGNS = {
    "error": ("✗", "$error"),
    "warning": ("!", "$warning"),
    "cut": ("⊣", "$warning"),
    "": ("", ""),
}


class RowsPane(Pane):
    """The rows of the reader's file; its filter searches all of the file.

    `refuse` is called with the reason why rows cannot be read.
    """

    def __init__(self, reader: Reader, refuse: Callable[[str], None]) -> None:
        columns = [
            Column("row", _number, right=True),
            Column("text", _text, width=LEAST, fills=True),
            Column("tokens", _tokens, width=6, right=True, rank=1),
            Column("sign", self._sign, width=1),
        ]
        self.table = Table(key=lambda line: line.position, columns=columns, titles=False)
        super().__init__(ROWS, self.table, id="rows")
        self.lines = FileRows(self._read)
        self.levels: Mapping[int, str] = {}  # number of a row → error or warning
        self._reader, self._refuse = reader, refuse

    @property
    def position(self) -> int:
        """Of the row that the cursor is on, in the file."""
        positions, line = self.lines.positions, self.table.cursor
        return positions[line] if line < len(positions) else 0

    def open(self, position: int, number: int) -> None:
        """Show the file; once its rows are counted at the row of this number, or this position."""
        self.lines, self.levels = FileRows(self._read), {}
        self.close_filter()
        self._show(line=0)
        self.lines.want(0)
        self._reader.ask(self, "index", partial(self._count, position, number), self._refuse)

    def _count(self, position: int, number: int, answer: Answer) -> None:
        lines = self.lines
        lines.total, lines.complete = max(lines.total, answer["rows"]), answer["event"] == "done"
        self._show(line=position if lines.complete and position else None)
        if lines.complete and number:
            self.go_to(number)

    def _read(self, first: int) -> None:
        self._reader.ask(self, "page", self._put, self._refuse, first=first, count=PAGE)

    def _put(self, answer: Answer) -> None:
        self.lines.put(answer)
        self._show()

    def _show(self, fact: str = "", line: int | None = None) -> None:
        """Show the rows that there are, the cursor on its row or on a line, and their number."""
        lines = self.lines
        self.table.show(lines, line=line)
        count = f"{lines.total:,}{'' if lines.complete else '…'}"
        if lines.found is not None:
            count = f"{len(lines):,} of {count}"
        facts = filter(None, [count, fact])
        self.show_title(*facts, title=flat(Path(self._reader.file.name).name))

    # Search

    def go_to(self, number: int) -> None:
        """Move to a row by its number."""

        def take(answer: Answer) -> None:
            position = answer["position"]
            if position is None:
                self._show(f"no row {number:,}")
                return
            if self.lines.found is not None:
                self.close_filter()
            self.lines.total = max(self.lines.total, position + 1)
            self._show_all(position)

        self._reader.ask(self, "locate", take, self._refuse, row=number)

    def filter(self, text: str) -> None:
        """Show the rows that have a text in them, as they are found; of `#120` the row."""
        text = text.strip()
        number = text.removeprefix("#")
        if text and text == number:
            self.lines.found = []
            self._show("and more …", line=0)
            self._reader.ask(self, "find", self._take_found, self._refuse, REST, text=text)
        elif self.lines.found is not None:
            self._show_all(self.position)
        if text != number and number.isdecimal():
            self.go_to(int(number[:12]))

    def _show_all(self, line: int) -> None:
        self.workers.cancel_group(self, "find")
        self.lines.found = None
        self._show(line=line)

    def _take_found(self, answer: Answer) -> None:
        self.lines.found = [*(self.lines.found or ()), *self.lines.put(answer)]
        done = answer["event"] == "done"
        self._show("" if done and answer["complete"] else "and more …")

    # Problems

    def mark(self, levels: Mapping[int, str]) -> None:
        """Show what a check says of rows."""
        self.levels = levels
        self._show()

    def problem_numbers(self) -> set[int]:
        """The numbers of the rows with a problem, as far as they are known."""
        return {*self.levels} | {line.number for line in self.lines.read.values() if line.problem}

    def _sign(self, line: RowLine) -> Content:
        level = "cut" if line.cut else self.levels.get(line.number, "")
        return Content.styled(*SIGNS["error" if line.problem else level])


def _number(line: RowLine) -> Content:
    return Content.styled(str(line.number), "dim")


def _text(line: RowLine) -> Content:
    text = line.text if line.text.strip() else line.problem
    return Content.styled(text, "$text-error" if line.problem else "")


def _tokens(line: RowLine) -> Content:
    text = "" if line.tokens is None else f"{line.tokens:,}"
    return Content.styled(text, "$text-warning" if line.cut else "dim")
