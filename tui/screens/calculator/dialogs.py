"""The calculator's dialogs: the document's claims, the formulas, and the changes to params.yaml."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from pipeline.calc.report import explain
from pipeline.workbench import calculated_claims
from tui.screens.calculator.query import Result
from tui.widgets.form import format_value

COLORS = {"holds": "green", "differs": "bold red", "depends": "yellow"}


class Reader(ModalScreen[None]):
    """A scrollable text, closed by Escape or the key that opened it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,d,e", "dismiss", "Close")]

    def __init__(self, *parts: RenderableType) -> None:
        super().__init__()
        self._parts = parts

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            for part in self._parts:
                yield Static(part)


def document_table() -> Reader:
    """The document's claims about numbers of the calculator: its value, the exact one, and why they differ."""
    summary, claims = calculated_claims()
    rows = Table("", "claim", "document", "exact", "", box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for row in claims:
        shown, mark = row["shown"], Text(row["mark"], COLORS[row["verdict"]])
        rows.add_row(row["title"], Text(row["quote"]), Text(shown["says"]), Text(shown["measured"]), mark)
        if row["verdict"] != "holds":
            rows.add_row("", Text(row["why"], "dim italic"))
    return Reader(Text(f"{summary}. `lora claims` has all of the document's.\n", "bold"), rows)


def formulas(result: Result) -> Reader:
    """The formula of each number with the values inserted."""
    rows = Table.grid(padding=(0, 2))
    for what, formula in explain(result.model, result.method, result.run, result.memory):
        rows.add_row(Text(what, "bold"), Text(formula))
    return Reader(Text(f"{result.title}\n", "bold"), rows)


class Confirm(ModalScreen[bool]):
    """Shows each change as `key: old → new`. Enter writes them, Escape cancels."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "dismiss(True)", "Write"),
        Binding("escape,q,n", "dismiss(False)", "Leave it"),
    ]

    def __init__(self, file: str, changes: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__()
        self._file, self._changes = file, changes

    def compose(self) -> ComposeResult:
        lines = [f"{key}: {_format_value(old)} → {_format_value(new)}" for key, (old, new) in self._changes.items()]
        with VerticalScroll(classes="dialog"):
            yield Static(Text(f"Write to {self._file}:\n", "bold"))
            yield Static(Text("\n".join(lines)), id="changes")
            yield Static(Text("\nEnter writes, Escape leaves it as it is.", "dim"))


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(value)}]" if isinstance(value, list) else format_value(value)
