"""The DAG of the stages, each with a symbol for its state; a click chooses one."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from pipeline.project.stage_graph import Stage
from pipeline.project.status import StageState
from tui.screens.pipeline.dag_layout import Layout, Position, layout

SIGNS = {
    "missing": ("○", "dim"),
    "current": ("✓", "green"),
    "changed": ("●", "yellow"),
    "waits": ("◌", "dim"),
    "running": ("▶", "bold cyan"),
    "failed": ("✗", "bold red"),
    "stopped": ("‖", "magenta"),
    "died": ("✗", "bold red"),
}
STATE_TEXT = {"current": "up to date", "missing": "not made yet", "waits": "will run again"}
LABEL_MARGIN = 3  # symbol and space before a name, a space after it
STUDIES = "studies "


class DagView(Widget):
    """The DAG of the stages that make models; below it a row with a symbol per study and the stages after them."""

    DEFAULT_CSS = "DagView { height: auto; width: auto; }"
    states: reactive[Mapping[str, StageState]] = reactive(dict)
    stages: reactive[Mapping[str, Stage]] = reactive(dict, layout=True)
    chosen: reactive[str] = reactive("")

    @dataclass
    class Chosen(Message):
        """A stage was clicked."""

        stage: str

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        super().__init__()
        self._layout: Layout = pipeline_layout(stages)
        self.set_reactive(DagView.stages, stages)

    def watch_stages(self) -> None:
        self._layout = pipeline_layout(self.stages)

    def get_content_width(self, *_: object) -> int:
        return self._layout.columns

    def get_content_height(self, *_: object) -> int:
        return self._layout.rows

    def render(self) -> RenderResult:
        cells = [[Segment(" ")] * self._layout.columns for _ in range(self._layout.rows)]
        for (row, column), character in self._layout.lines.items():
            cells[row][column] = Segment(character, Style(dim=True))
        for name, position in self._layout.positions.items():
            state = self.states.get(name)
            sign, style = SIGNS[state.state] if state else ("·", "dim")
            symbol_only = position.width < len(name)  # a study
            cells[position.row][position.column] = Segment(
                sign, Style.parse(style) + Style(reverse=symbol_only and name == self.chosen)
            )
            for offset, letter in enumerate("" if symbol_only else name, 2):
                cells[position.row][position.column + offset] = Segment(letter, Style(reverse=name == self.chosen))
        return Text("\n").join(Text.assemble(*((c.text, c.style or "") for c in row)) for row in cells)

    def on_click(self, event: Click) -> None:
        for name, position in self._layout.positions.items():
            if event.y == position.row and position.column <= event.x < position.column + position.width:
                self.post_message(self.Chosen(name))


def pipeline_layout(stages: Mapping[str, Stage]) -> Layout:
    """The DAG of the stages that make models, with a row for those that measure below it."""
    models = {name: stage for name, stage in stages.items() if not stage.is_measurement}
    needs = {name: [need for need in stage.needs if need in models] for name, stage in models.items()}
    dag = layout(needs, LABEL_MARGIN) if needs else Layout({}, {}, 0, 0)
    measurements = {name: stage for name, stage in stages.items() if stage.is_measurement}
    if not measurements:
        return dag
    row, positions, lines = dag.rows, dict(dag.positions), dict(dag.lines)
    lines |= {(row, column): letter for column, letter in enumerate(STUDIES)}
    column = len(STUDIES)
    for name, stage in measurements.items():
        if stage.kind == "study":
            positions[name] = Position(row, column, 2)
            column += 2
        else:
            lines |= {(row, column + number): character for number, character in enumerate("─▶")}
            positions[name] = Position(row, column + 3, LABEL_MARGIN + len(name))
            column += 3 + LABEL_MARGIN + len(name)
    return Layout(positions, lines, row + 1, max(dag.columns, column))
