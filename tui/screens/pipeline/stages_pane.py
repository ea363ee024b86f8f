"""The pane of the stages: the tree with a cursor, and how many stages are in which state."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import OptionList

from pipeline.project.stage_graph import Stage
from pipeline.views.stages import StageState
from tui.screens.pipeline.tree import (
    GROUP,
    SIGNS,
    URGENCY,
    Row,
    draw_rows,
    group_state,
    look_of,
    tree_rows,
)
from tui.widgets.pane import Pane
from tui.widgets.text import KeyedList


class StageTree(KeyedList):
    """The rows of the tree."""

    DEFAULT_CSS = """
    StageTree { height: 1fr; background: transparent; text-wrap: nowrap; text-overflow: ellipsis; }
    """


class StagesPane(Pane):
    """Shows the DAG as a tree. `chosen` is the stage that the cursor is on."""

    TITLE = "Stages"
    HELP = """\
The tree is the DAG: a stage stands below the one that it needs, *after …* names what else it
needs. The sign is its state. Of a stage that runs: how much is done and how long it will take,
from its pace of late and that of its last run. Of a changed one: what changed since its artifact
was made. At the right: how long the last run took.

The cursor follows the stage that runs, until you move it. **Enter** goes to its params, **S** runs
this stage alone, **F** again though nothing changed, **R** all that is out of date. **Space** (or
← →) folds the studies, **v** draws the DAG as a picture."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "params"),
        Binding("v", "screen.picture", "picture"),
        Binding("space", "toggle_group", "Fold or unfold the studies", show=False),
        Binding("left", "fold(False)", "Fold the studies", show=False),
        Binding("right", "fold(True)", "Unfold the studies", show=False),
    ]

    @dataclass
    class Chosen(Message):
        """The cursor is on another stage. `by_user`: a key or a click moved it."""

        stage: str
        by_user: bool

    class Opened(Message):
        """Enter was pressed on a stage."""

    def __init__(self) -> None:
        super().__init__(id="stages")
        self.rows: list[Row] = []
        self.chosen = ""
        self.unfolded = False
        self._stages: Mapping[str, Stage] = {}
        self._needs: Mapping[str, Sequence[str]] = {}
        self._states: Mapping[str, StageState] = {}
        self._expected = ""  # the row that the program has moved the cursor to

    def contents(self) -> Iterable[Widget]:
        yield StageTree()

    @property
    def tree_list(self) -> StageTree:
        return self.query_one(StageTree)

    def show(
        self,
        stages: Mapping[str, Stage],
        needs: Mapping[str, Sequence[str]],
        states: Mapping[str, StageState],
    ) -> None:
        """Show the stages with their states. The cursor stays on its stage."""
        self._states = states
        if (stages, needs) != (self._stages, self._needs):
            self._stages, self._needs = stages, needs
            self.rows = tree_rows(stages, needs, self.unfolded)
            if self.chosen not in stages and stages:
                self.chosen = next(iter(stages))
        self._draw()

    def on_resize(self, event: object) -> None:
        super().on_resize(event)  # type: ignore[arg-type]  # Textual's event
        self._draw()

    def _draw(self) -> None:
        counts = Counter(look_of(state) for state in self._states.values())
        order = dict.fromkeys(SIGNS[state] for state in URGENCY)  # failed and died have one sign
        signs = [(f"{counts[sign]} {sign[0]}", sign[1]) for sign in order if counts[sign]]
        self.show_title()
        self.border_title = Content(" ").join(
            [Content.styled(self.title, "bold"), *(Content.styled(*s) for s in signs)]
        )
        self._draw_rows(self._row_of(self.chosen))

    def _draw_rows(self, key: str) -> None:
        """Draw the rows, with the cursor on `key` if the one that it was on is gone."""
        rows = self.tree_list
        if not (width := rows.scrollable_content_region.width) or not self.rows:  # hidden
            return
        before = rows.highlighted_option
        rows.show(draw_rows(self.rows, self._states, width), fallback=key)
        if before is None:
            rows.highlighted = rows.get_option_index(key)
        if (now := rows.highlighted_option) and (before is None or now.id != before.id):
            self._expected = str(now.id)

    def _row_of(self, stage: str) -> str:
        keys = [row.key for row in self.rows]
        if stage in keys:
            return stage
        return GROUP if self._is_grouped(stage) else next(iter(keys), "")

    def select(self, stage: str) -> None:
        """Move the cursor to a stage; one that is folded is unfolded."""
        if stage not in self._stages:
            return
        if self._row_of(stage) != stage:
            self._fold(True)
        self.chosen = stage
        if self.tree_list.option_count:
            self._expected, self.tree_list.highlighted = (
                stage,
                self.tree_list.get_option_index(stage),
            )
        self.post_message(self.Chosen(stage, by_user=False))

    @on(OptionList.OptionHighlighted)
    def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        key, expected = str(event.option_id), self._expected
        self._expected = ""
        row = next((row for row in self.rows if row.key == key), None)
        if row is None or key == expected or key == self.chosen:
            return
        urgent = group_state(row.members, self._states)
        self.chosen = row.members[0] if row.members else key
        if urgent and row.members:
            self.chosen = urgent.stage.name
        self.post_message(self.Chosen(self.chosen, by_user=True))

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if event.option_id == GROUP:
            self._fold(not self.unfolded)
        else:
            self.post_message(self.Opened())

    # The group

    def action_toggle_group(self) -> None:
        self.action_fold(not self.unfolded)

    def action_fold(self, unfold: bool) -> None:
        option = self.tree_list.highlighted_option
        if option and (option.id == GROUP or self._is_grouped(str(option.id))):
            self._fold(unfold)

    def _is_grouped(self, name: str) -> bool:
        return name in self._stages and bool(self._stages[name].group)

    def _fold(self, unfold: bool) -> None:
        if unfold != self.unfolded:
            self.unfolded = unfold
            self.rows = tree_rows(self._stages, self._needs, unfold)
            self._draw_rows(GROUP)
