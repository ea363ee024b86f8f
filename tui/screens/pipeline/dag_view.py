"""The DAG as a picture: every stage with a sign for its state, and arrows; a click chooses one."""

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
from tui.screens.pipeline.dag_layout import Layout, Place, layout

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
WORDS = {"current": "up to date", "missing": "not made yet", "waits": "will run again"}
LABEL = 3  # sign and space before a name, a space after it
STUDIES = "studies "


class DagPicture(Widget):
    """As wide as the DAG needs; in fewer columns the names alone show, one after the other, as the list does.

    What measures statements stands in one row below: a sign for each study, then the stages that follow them.
    """

    DEFAULT_CSS = "DagPicture { height: auto; width: auto; }"
    states: reactive[Mapping[str, StageState]] = reactive(dict)
    stages: reactive[Mapping[str, Stage]] = reactive(dict, layout=True)
    chosen: reactive[str] = reactive("")

    @dataclass
    class Chosen(Message):
        """A stage was clicked."""

        stage: str

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        super().__init__()
        self._layout: Layout = pictured(stages)
        self.set_reactive(DagPicture.stages, stages)

    def watch_stages(self) -> None:
        self._layout = pictured(self.stages)

    def get_content_width(self, *_: object) -> int:
        return self._layout.columns

    def get_content_height(self, *_: object) -> int:
        return self._layout.rows

    def render(self) -> RenderResult:
        cells = [[Segment(" ")] * self._layout.columns for _ in range(self._layout.rows)]
        for (row, column), character in self._layout.lines.items():
            cells[row][column] = Segment(character, Style(dim=True))
        for name, place in self._layout.places.items():
            state = self.states.get(name)
            sign, style = SIGNS[state.state] if state else ("·", "dim")
            bare = place.width < len(name)  # a study, of which the sign alone has room
            cells[place.row][place.column] = Segment(
                sign, Style.parse(style) + Style(reverse=bare and name == self.chosen)
            )
            for offset, letter in enumerate("" if bare else name, 2):
                cells[place.row][place.column + offset] = Segment(letter, Style(reverse=name == self.chosen))
        return Text("\n").join(Text.assemble(*((c.text, c.style or "") for c in row)) for row in cells)

    def on_click(self, event: Click) -> None:
        for name, place in self._layout.places.items():
            if event.y == place.row and place.column <= event.x < place.column + place.width:
                self.post_message(self.Chosen(name))


def pictured(stages: Mapping[str, Stage]) -> Layout:
    """The DAG of what makes models, and below it a row of what measures them."""
    making = {name: stage for name, stage in stages.items() if not stage.is_measurement}
    needs = {name: [need for need in stage.needs if need in making] for name, stage in making.items()}
    made = layout(needs, LABEL) if needs else Layout({}, {}, 0, 0)
    measuring = {name: stage for name, stage in stages.items() if stage.is_measurement}
    if not measuring:
        return made
    row, places, lines = made.rows, dict(made.places), dict(made.lines)
    lines |= {(row, column): letter for column, letter in enumerate(STUDIES)}
    column = len(STUDIES)
    for name, stage in measuring.items():
        if stage.kind == "study":
            places[name] = Place(row, column, 2)
            column += 2
        else:
            lines |= {(row, column + number): character for number, character in enumerate("─▶")}
            places[name] = Place(row, column + 3, LABEL + len(name))
            column += 3 + LABEL + len(name)
    return Layout(places, lines, row + 1, max(made.columns, column))
