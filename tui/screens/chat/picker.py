"""The dialog that chooses one or two models."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from pipeline.views.model_library import Entry
from tui.panes.pane import About, FilterField, Pane
from tui.panes.table import Table
from tui.screens.models.columns import Folder, ModelList
from tui.services.evaluation import Evaluation

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


class ModelPicker(ModalScreen[list[Path] | None]):
    """Returns the paths of the chosen models, first the one that was chosen first; None on
    Escape.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close"),
        Binding("slash", "filter", "Filter"),
    ]

    def __init__(self, entries: Sequence[Entry], chosen: Sequence[Path]) -> None:
        super().__init__()
        self._entries = entries
        self._was_chosen = False  # with Space: else Enter means the model under the cursor alone
        self.table = ModelList(Evaluation(Path()))
        self.table.chosen = list(chosen)
        self.pane = Pane(ABOUT, self.table, classes="dialog")

    def compose(self) -> ComposeResult:
        yield self.pane

    def on_mount(self) -> None:
        self.table.show_entries(self._entries)
        self.table.show(self.table.rows, self.table.columns[:3])  # what it is called
        self.set_focus(self.table)

    def action_filter(self) -> None:
        self.pane.open_filter()

    def action_leave(self) -> None:
        if isinstance(self.focused, FilterField) or self.pane.filter_text:
            self.pane.close_filter()
        else:
            self.dismiss(None)

    @on(Table.Chosen)
    def _choose(self, event: Table.Chosen) -> None:
        if isinstance(event.row, Folder):
            return
        path, chosen = event.row.model.path, self.table.chosen
        self._was_chosen = True
        if path in chosen:
            chosen.remove(path)
        else:  # the one chosen last makes room
            self.table.chosen = [*chosen[: MOST_MODELS - 1], path]
        self.table.refresh()

    @on(Table.Opened)
    def _use(self, event: Table.Opened) -> None:
        if isinstance(event.row, Folder):
            self.table.toggle(event.row)
        else:
            chosen = self.table.chosen if self._was_chosen else []
            self.dismiss(chosen or [event.row.model.path])
