"""The panes of the screen: the large chart, the small multiples, the list of runs, details,
answers.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log10
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Click
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from tui.screens.curves.describe import Paint, adapter_line, run_line
from tui.screens.curves.metrics import METRICS
from tui.screens.curves.selection import Runs
from tui.widgets.pane import Pane
from tui.widgets.plot.chart import Chart, PlotWidget
from tui.widgets.plot.line_plot import Line, Row, View, line_plot
from tui.widgets.plot.scale import spans_decade
from tui.widgets.plot.sparkline import sparkline
from tui.widgets.text import KeyedList, Lines

# cells of a small plot: wished for, at least; rows below which it is a sparkline
CELL, LOW = (26, 18), 4
# cells of a sparkline, at least and at most, of the text beside it, between two
SPARK, TEXT, GAP = (8, 30), 20, 3


class ChartPane(Pane):
    """One metric, large."""

    TITLE = METRICS["loss"].title
    HELP = """\
One metric over the steps, the smoothed line of each run that is on. The run that the list's cursor
is on is thicker, lies on top, and has its raw values behind it. Beside each line's end: its name
and newest value, or the value at the step cursor.

`×` measured on held-out examples · `»` flat from here: later epochs' mean losses stay within 5% of
the total drop.

The scale is logarithmic where the values span a factor of ten; `l` switches. *All steps* grows
with the run, *last … steps* moves with it, *steps … to …* stays. A drag moves the picture, the
wheel zooms, a click sets the step cursor."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "screen.zoom(0.7)", "Zoom in", id="curves.zoom_in"),
        # 1.43 takes a step of 0.7 back
        Binding("down", "screen.zoom(1.43)", "out", id="curves.zoom_out"),
        Binding("v", "screen.zoom(1, 0.7)", "Values in", id="curves.zoom_values_in"),
        Binding("V", "screen.zoom(1, 1.43)", "out", id="curves.zoom_values_out"),
        Binding("shift+up", "screen.pan(0, 0.1)", "Greater values", id="curves.up", show=False),
        Binding(
            "shift+down", "screen.pan(0, -0.1)", "Smaller values", id="curves.down", show=False
        ),
        Binding(
            "home,g",
            "screen.end_of_steps(0)",
            "Cursor to the first step",
            id="curves.first",
            show=False,
        ),
        Binding(
            "end,G",
            "screen.end_of_steps(1)",
            "Cursor to the last step",
            id="curves.last",
            show=False,
        ),
    ]

    def contents(self) -> Iterable[Widget]:
        yield Chart(id="chart")


@dataclass(frozen=True)
class Panel:
    """A small plot: the metric's name, a run's value and its colour, and the lines for so many
    columns.
    """

    name: str
    value: str
    style: str
    lines: Callable[[int], Sequence[Line]]


class SmallPlots(PlotWidget, can_focus=True):
    """Plots side by side, sparklines where there is no room, and constants as numbers; one of them
    is chosen.
    """

    @dataclass
    class Chosen(Message):
        """The user wants this metric large."""

        name: str

    class Resized(Message):
        """There is room for other plots."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Previous", show=False),
        Binding("right", "move(1)", "Next", show=False),
        Binding("enter", "choose", "Enlarge", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._panels: Sequence[Panel] = ()
        self._numbers: Sequence[tuple[str, str]] = ()
        self._view = View()
        self._at = 0
        self._places: list[tuple[range, range, int]] = []  # columns, rows, number of the panel

    def draw(self, panels: Sequence[Panel], numbers: Sequence[tuple[str, str]], view: View) -> None:
        """Plots of `panels`; `numbers` are names and values of what is constant."""
        self._panels, self._numbers, self._view = panels, numbers, view
        self._at = min(self._at, max(len(panels) - 1, 0))
        self._draw()

    def _draw(self) -> None:
        width, height = self.size
        self._places = []
        rows_for_plots = height - bool(self._numbers)
        columns = self._columns(width, rows_for_plots)
        self.show_rows(
            self._grid(width, rows_for_plots, columns)
            if columns
            else self._sparklines(width, height)
        )

    def _columns(self, width: int, height: int) -> int:
        """Plots side by side so that all fit; 0 if none would be high enough."""
        if not self._panels or height < LOW or width < CELL[1]:
            return 0
        columns = max(min(len(self._panels), width // CELL[0]), 1)
        while (
            ceil(len(self._panels) / columns) > height // LOW and width // (columns + 1) >= CELL[1]
        ):
            columns += 1
        return columns

    def _grid(self, width: int, height: int, columns: int) -> list[Row]:
        panels = self._panels[: columns * (height // LOW)]
        lines = ceil(len(panels) / columns)
        rows: list[Row] = []
        for first in range(0, len(panels), columns):
            part = panels[first : first + columns]
            room = height * (first // columns + 1) // lines - height * (first // columns) // lines
            block: list[Row] = [[] for _ in range(room)]
            for number, panel in enumerate(part, first):
                left = width * (number - first) // columns
                wide = width * (number - first + 1) // columns - left
                self._places.append(
                    (range(left, left + wide), range(len(rows), len(rows) + room), number)
                )
                for row, cells in zip(block, self._plot(number, panel, wide, room), strict=True):
                    row += cells
            rows += block
        if self._numbers:
            rows.append(self._constants(width))
        return rows

    def _plot(self, number: int, panel: Panel, width: int, height: int) -> list[Row]:
        """A title with the value, and the plot below it; a column stays free at the right."""
        lines = panel.lines(2 * width)
        log = spans_decade(value for line in lines if not line.stray for value in line.values())
        room = width - 2 - cell_len(panel.value)
        title = METRICS[panel.name].short[: max(room - 1, 0)]
        head: Row = [
            (title, self._title_style(number)),
            (" " * (room - len(title)), ""),
            (panel.value, panel.style),
            ("  ", ""),
        ]
        view = View(self._view.x, None, log, self._view.cursor)
        plot = line_plot(lines, width - 2, height - 1, view, self.ink, x_axis=False, labels=False)
        return [head, *([*row, ("  ", "")] for row in plot.rows)]

    def _title_style(self, number: int) -> str:
        return "bold reverse" if self.has_focus and number == self._at else "bold"

    def _sparklines(self, width: int, height: int) -> list[Row]:
        """`grad norm ▇▅▃▁ 0.31   learning rate 0.002`, in as many rows as there are."""
        rows: list[Row] = [[] for _ in range(max(height, 1))]
        spark = min(max(width // (len(self._panels) + 1) - TEXT, SPARK[0]), SPARK[1])
        y = column = 0
        for number, panel in enumerate(self._panels):
            lines = panel.lines(2 * spark)
            values = [value for _, value in lines[-1].points] if lines else []
            values = [log10(value) for value in values] if spans_decade(values) else values
            parts: Row = [
                (METRICS[panel.name].short, self._title_style(number)),
                (f" {sparkline(values, spark)} {panel.value}", panel.style),
            ]
            y, column = self._append(rows, y, column, parts, width, number)
        for name, value in self._numbers:
            y, column = self._append(rows, y, column, [(name, "bold"), (f" {value}", "")], width)
        return rows

    def _append(
        self, rows: list[Row], y: int, column: int, parts: Row, width: int, number: int = -1
    ) -> tuple[int, int]:
        """Add parts to a row, or to the next one; what fits in none is left out."""
        length = sum(cell_len(text) for text, _ in parts)
        if column and column + length > width:
            y, column = y + 1, 0
        if y >= len(rows) or column + length > width:
            return y, column
        if number >= 0:
            self._places.append((range(column, column + length), range(y, y + 1), number))
        rows[y] += [*parts, (" " * GAP, "")]
        return y, column + length + GAP

    def _constants(self, width: int) -> Row:
        row: list[Row] = [[]]
        column = 0
        for name, value in self._numbers:
            _, column = self._append(
                row, 0, column, [(name, self.ink.ticks), (f" {value}", "")], width
            )
        return row[0]

    def on_resize(self) -> None:
        self.post_message(self.Resized())

    def on_focus(self) -> None:
        self._draw()

    def on_blur(self) -> None:
        self._draw()

    def action_move(self, by: int) -> None:
        self._at = (self._at + by) % max(len(self._panels), 1)
        self._draw()

    def action_choose(self) -> None:
        if self._panels:
            self.post_message(self.Chosen(self._panels[self._at].name))

    def on_click(self, event: Click) -> None:
        for columns, rows, number in self._places:
            if event.x in columns and event.y in rows:
                self._at = number
                self.action_choose()


class MetricsPane(Pane):
    """What else the runs log."""

    TITLE = "Also logged"
    HELP = """\
What the runs log beside the large chart, each with the value of the run that the list's cursor is
on (at the step cursor, if there is one). What does not change is a number and no plot. Enter, or a
click, enlarges one in place of the loss; Esc brings the loss back.

*divergence* is the Kullback–Leibler divergence from the base on the retention texts, in nats a
token: 0 means that nothing was forgotten · *margin* and *accuracy* compare chosen with rejected
answers · *memory* is measured at the peak of a step."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "choose", "Enlarge", id="curves.enlarge"),
        Binding("left,right", "move", "Choose", id="curves.choose", key_display="← →"),
    ]

    def contents(self) -> Iterable[Widget]:
        yield SmallPlots()


LORA = "finetune_lora"


class RunList(KeyedList):
    """A line per run, and below an open sweep one per adapter. Option ids are their keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "screen.open", "Open", show=False),
    ]
    DEFAULT_CSS = """
    RunList { height: 1fr; scrollbar-size-vertical: 1; background: transparent; }
    RunList:focus { background: transparent; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.sweeps: dict[str, str] = {}  # key of a sweep or of an adapter → key of its sweep
        self._show: Callable[[], None] = lambda: None

    def show_runs(self, runs: Runs, expanded: Collection[str], filter_text: str = "") -> None:
        """Show the runs whose label contains the filter's text, or the adapters of sweeps that
        do.
        """
        self._show = lambda: self.show_runs(runs, expanded, filter_text)
        paint = Paint(
            self.background_colors[1], self.app.theme_variables, max(self.size.width - 1, 20)
        )
        option, before, lines = self.highlighted_option, self.sweeps, dict[str, Text]()
        self.sweeps = {}
        wanted = filter_text.lower()
        for key, view in runs.views.items():
            fits = wanted in view.run.label.lower()
            adapters = view.curve_logs.values() if view.run.sweeps else ()
            members = [log for log in adapters if fits or wanted in log.name.lower()]
            if not fits and not members:
                continue
            is_open = key in expanded or not fits
            lines[key] = run_line(runs, key, paint, expanded=is_open)
            if view.run.sweeps:
                self.sweeps[key] = key
            for log in members if is_open else ():
                lines[adapter := view.adapter_key(log)] = adapter_line(
                    view, log, runs.looks[key], paint
                )
                self.sweeps[adapter] = key
        # The highlight of an adapter that is no longer listed moves to its sweep.
        self.show(lines, before.get(str(option.id), "") if option else "")
        if option is None and lines:  # the first look is at LoRA's newest run
            lora = next(
                (key for key in lines if key in runs.views and runs.views[key].run.stage == LORA),
                "",
            )
            self.highlighted = list(lines).index(lora) if lora else 0

    def on_resize(self) -> None:
        self._show()

    @property
    def pointed(self) -> str:
        """The key that the cursor is on, or ""."""
        return str(self.highlighted_option.id) if self.highlighted_option else ""


class RunsPane(Pane):
    """Which runs there are, and which are on."""

    TITLE = "Runs"
    FILTER = True
    HELP = """\
The runs: sign and colour of the method (`·` where it is off), name, loss, and the share of the
base's answers on old sentences that it kept, if it was evaluated. The loss is on held-out examples
if they were measured. For a run that is not finished: `▶` running, `‖` stopped, `✗` failed or
died, and how far it is. One that is off shows when it ended.

On are the latest run of each method and what is running; Space switches. A sweep is one line,
drawn as its best adapter (bright) and the others (dim); Enter opens it. Names tell what differs
from the current settings."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "screen.switch", "Show", id="curves.toggle"),
        Binding("enter", "screen.open", "Open", id="curves.open"),
        Binding("i", "screen.info", "All", id="curves.info"),
        Binding("o", "screen.stage", "Stage", id="curves.stage"),
        Binding("c", "screen.chat", "Chat", id="curves.chat"),
    ]

    @dataclass
    class Filtered(Message):
        """The filter's text changed."""

    def contents(self) -> Iterable[Widget]:
        yield RunList()

    def filtered(self, text: str) -> None:  # noqa: ARG002  # `filter_text` has it
        self.post_message(self.Filtered())


class DetailsPane(Pane):
    """The run that the cursor is on."""

    TITLE = "Run"
    HELP = """\
The run that the list's cursor is on: its state, values at its newest step or at the step cursor,
memory as it was predicted and measured, and its pace. The time left is estimated from the last 200
steps. `i` in the list tells all."""
    text = Text()  # what is shown

    def contents(self) -> Iterable[Widget]:
        yield Static(markup=False)

    def show_text(self, text: Text) -> None:
        """What does not fit is cut: a text that changes with each key must not lay out the screen
        anew.
        """
        if text != self.text:
            self.text = text
            self.query_one(Static).update(text, layout=False)


class AnswersPane(Pane):
    """What the runs answered."""

    TITLE = "Answers"
    HELP = """\
What the runs that are on answered to the prompts of `samples` while they trained: at the step
cursor, or at last."""
    text = Text()  # what is shown

    def contents(self) -> Iterable[Widget]:
        with VerticalScroll():
            yield Lines()

    def show_text(self, text: Text) -> None:
        if text != self.text:
            self.text = text
            self.query_one(Lines).show(lambda _: list(text.split()))
