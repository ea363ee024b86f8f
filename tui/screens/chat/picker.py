"""The dialog that chooses one or two models."""

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen

from pipeline.views.model_library import Entry
from tui.panes.pane import About, FilterField, Pane
from tui.panes.table import Column, Table
from tui.screens.conversation.session import method_of
from tui.widgets.cells import method_sign

MOST_MODELS = 2  # side by side
ABOUT = About(
    "Models: one, or two side by side",
    keys=[
        Binding("enter", "use", "use"),
        Binding("space", "choose", "choose, at most two"),
        Binding("slash", "screen.filter", "filter", show=False),
    ],
    filters="filter",
)


class ModelPicker(ModalScreen[list[str] | None]):
    """Returns the paths of the chosen models, first the one that was chosen first; None on
    Escape.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close"),
        Binding("slash", "filter", "Filter"),
    ]

    def __init__(self, entries: Sequence[Entry], chosen: Sequence[str]) -> None:
        super().__init__()
        paths = {_path(entry) for entry in entries}
        self._entries = entries
        self._chosen = [path for path in chosen if path in paths]
        self._was_chosen = False  # with Space: else Enter means the model under the cursor alone
        self.table = Table[Entry](key=_path, words=lambda entry: entry.label, titles=False)

    def compose(self) -> ComposeResult:
        yield Pane(ABOUT, self.table, classes="dialog")

    def on_mount(self) -> None:
        columns = [
            Column("", self._number, width=1),
            Column("", _sign, width=1),
            Column("name", self._label, fills=True),
            Column("facts", _facts),
        ]
        self.table.show(self._entries, columns)
        self.set_focus(self.table)

    def _number(self, entry: Entry) -> str:
        path = _path(entry)
        return str(self._chosen.index(path) + 1) if path in self._chosen else ""

    def _label(self, entry: Entry) -> Content:
        return Content.styled(entry.label, "bold" if _path(entry) in self._chosen else "")

    def action_filter(self) -> None:
        self.query_one(Pane).open_filter()

    def action_leave(self) -> None:
        pane = self.query_one(Pane)
        if isinstance(self.focused, FilterField) or pane.filter_text:
            pane.close_filter()
        else:
            self.dismiss(None)

    @on(Table.Chosen)
    def _choose(self, event: Table.Chosen) -> None:
        path, self._was_chosen = _path(event.row), True
        if path in self._chosen:
            self._chosen.remove(path)
        else:  # the one chosen last makes room
            self._chosen = [*self._chosen[: MOST_MODELS - 1], path]
        self.table.refresh()

    @on(Table.Opened)
    def _use(self, event: Table.Opened) -> None:
        self.dismiss(self._chosen if self._was_chosen and self._chosen else [_path(event.row)])


def _path(entry: Entry) -> str:
    return str(entry.model.path)


def _sign(entry: Entry) -> Content:
    return Content.styled(*method_sign(method_of(entry)))


def _facts(entry: Entry) -> Content:
    model = entry.model
    facts = [model.method] if model.method != entry.label else []
    facts += [f"rank {model.rank}"] if model.rank else []
    return Content.styled(" · ".join(facts), "$foreground-muted")
