"""The DAG of the stages as a picture in characters, in a dialog; a click chooses a stage."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.containers import ScrollableContainer
from textual.content import Content
from textual.events import Click
from textual.message import Message
from textual.screen import ModalScreen
from textual.widget import Widget

from pipeline.project.stage_graph import Stage
from pipeline.views.stages import StageState
from tui.screens.pipeline.tree import MUTED, look_of, short_name

LABEL_MARGIN = 3  # symbol and space before a name, a space after it

N, E, S, W = 1, 2, 4, 8
LINES = {
    E | W: "─",
    N | S: "│",
    E | S: "┌",
    S | W: "┐",
    N | E: "└",
    N | W: "┘",
    N | E | S: "├",
    N | S | W: "┤",
}
LINES |= {E | S | W: "┬", N | E | W: "┴", N | E | S | W: "┼", W: "─", E: "─", N: "│", S: "│"}
GUTTER = 3  # character columns before a node: bend, arrow, space


@dataclass(frozen=True)
class Position:
    """Where a node's label starts, and its width including the space after it."""

    row: int
    column: int
    width: int


@dataclass(frozen=True)
class Layout:
    """Positions of the nodes, and the line characters by (row, column)."""

    positions: Mapping[str, Position]
    lines: Mapping[tuple[int, int], str]
    rows: int
    columns: int


def layout(needs: Mapping[str, Sequence[str]], margin: int) -> Layout:
    """Lay out the nodes of `needs` (node → its dependencies), which must be in topological order.

    One column per depth; edges run from the right of a node to the left of the next. A label is
    `margin` columns wider than the node's name: a symbol before it and a space after it.
    """
    # An edge that is implied by a longer way is not drawn (transitive reduction).
    above: dict[str, set[str]] = {}  # node → all nodes that it needs
    depth: dict[str, int] = {}
    edges: list[tuple[str, str]] = []
    for node, sources in needs.items():
        implied = {far for source in sources for far in above[source]}
        above[node] = implied | {*sources}
        depth[node] = 1 + max((depth[source] for source in sources), default=-1)
        edges += [(source, node) for source in sources if source not in implied]
    levels = [
        [node for node in needs if depth[node] == level] for level in range(max(depth.values()) + 1)
    ]
    widths = [margin + max(map(len, nodes)) for nodes in levels]
    starts = [sum(widths[:level]) + GUTTER * level for level in range(len(levels))]
    # Nodes of one depth get a row each. A single node continues the row of its only source, or is
    # centred.
    tallest = max(map(len, levels))
    rows: dict[str, int] = {}
    for nodes in levels:
        for index, node in enumerate(nodes):
            sources = [source for source, target in edges if target == node]
            is_chain = (
                len(nodes) == len(sources) == 1
                and sum(source == sources[0] for source, _ in edges) == 1
            )
            rows[node] = rows[sources[0]] if is_chain else (tallest - len(nodes)) // 2 + index
    positions = {
        node: Position(rows[node], starts[depth[node]], margin + len(node)) for node in needs
    }
    return Layout(
        positions, _route_edges(edges, positions), 1 + max(rows.values()), starts[-1] + widths[-1]
    )


def _route_edges(
    edges: Sequence[tuple[str, str]], positions: Mapping[str, Position]
) -> dict[tuple[int, int], str]:
    """Every edge runs along the source's row, turns just before the target's column, and ends in an
    arrow.
    """
    directions: dict[tuple[int, int], int] = {}

    def add(row: int, column: int, direction: int) -> None:
        directions[row, column] = directions.get((row, column), 0) | direction

    for source, target in edges:
        start, end = positions[source], positions[target]
        bend = end.column - GUTTER
        for column in range(start.column + start.width, bend):
            add(start.row, column, E | W)
        low, high = sorted((start.row, end.row))
        for row in range(low, high):
            add(row, bend, S)
            add(row + 1, bend, N)
        add(start.row, bend, W)
        add(end.row, bend, E)
    characters = {cell: LINES[direction] for cell, direction in directions.items()}
    arrows = {(positions[target].row, positions[target].column - 2): "▶" for _, target in edges}
    return characters | arrows


def pipeline_layout(stages: Mapping[str, Stage]) -> Layout:
    """The DAG of the stages that make models, by their short names, with a row for those that
    measure below it.
    """
    models = {name: stage for name, stage in stages.items() if not stage.is_measurement}
    short = {name: short_name(stage) for name, stage in models.items()}
    needs = {
        short[name]: [short[need] for need in stage.needs if need in models]
        for name, stage in models.items()
    }
    dag = layout(needs, LABEL_MARGIN) if needs else Layout({}, {}, 0, 0)
    positions, lines = {name: dag.positions[short[name]] for name in models}, dict(dag.lines)
    measurements = {name: stage for name, stage in stages.items() if stage.is_measurement}
    if not measurements:
        return Layout(positions, lines, dag.rows, dag.columns)
    row = dag.rows
    group = next((stage.group for stage in measurements.values() if stage.group), "")
    label = f"{group} " if group else ""
    lines |= {(row, column): letter for column, letter in enumerate(label)}
    column = len(label)
    for name, stage in measurements.items():
        if stage.group:
            positions[name] = Position(row, column, 2)
            column += 2
        else:
            lines |= {(row, column + number): character for number, character in enumerate("─▶")}
            positions[name] = Position(row, column + 3, LABEL_MARGIN + len(name))
            column += 3 + LABEL_MARGIN + len(name)
    return Layout(positions, lines, row + 1, max(dag.columns, column))


class DagView(Widget):
    """The DAG of the stages that make models; below it a row with a symbol per study and the stages
    after them.
    """

    DEFAULT_CSS = "DagView { height: auto; width: auto; }"

    @dataclass
    class Chosen(Message):
        """A stage was clicked."""

        stage: str

    def __init__(
        self, stages: Mapping[str, Stage], states: Mapping[str, StageState], chosen: str
    ) -> None:
        super().__init__()
        self.drawing = pipeline_layout(stages)
        self._stages, self._states, self._chosen = stages, states, chosen

    def get_content_width(self, *_: object) -> int:
        return self.drawing.columns

    def get_content_height(self, *_: object) -> int:
        return self.drawing.rows

    def render(self) -> Content:
        cells = [[(" ", "")] * self.drawing.columns for _ in range(self.drawing.rows)]
        for (row, column), character in self.drawing.lines.items():
            cells[row][column] = character, MUTED
        for name, position in self.drawing.positions.items():
            sign, style = look_of(self._states.get(name))
            # a study is a sign alone
            label = "" if position.width == 2 else short_name(self._stages[name])
            reverse = "reverse" if name == self._chosen else ""
            cells[position.row][position.column] = sign, style if label else f"{style} {reverse}"
            for offset, letter in enumerate(label, 2):
                cells[position.row][position.column + offset] = letter, reverse
        return Content("\n").join(Content.assemble(*row) for row in cells)

    def on_click(self, event: Click) -> None:
        for name, position in self.drawing.positions.items():
            if (
                event.y == position.row
                and position.column <= event.x < position.column + position.width
            ):
                self.post_message(self.Chosen(name))


class Picture(ModalScreen[str | None]):
    """The picture. Returns the stage that was clicked, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,v", "dismiss(None)", "Close")]
    CSS = """
    Picture { align: center middle; }
    Picture .dialog { width: auto; max-width: 100%; max-height: 100%; padding: 0 1; }
    """

    def __init__(
        self, stages: Mapping[str, Stage], states: Mapping[str, StageState], chosen: str
    ) -> None:
        super().__init__()
        self._view = DagView(stages, states, chosen)

    def compose(self) -> Iterable[Widget]:
        dialog = ScrollableContainer(self._view, classes="dialog -fit")
        dialog.border_title, dialog.border_subtitle = "What needs what", "click a stage  Esc close"
        yield dialog

    def on_dag_view_chosen(self, event: DagView.Chosen) -> None:
        self.dismiss(event.stage)
