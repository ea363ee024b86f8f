"""The monitor: CPU, memory and GPUs over time, what the running stage predicted, and the processes
of the project.
"""

import time
from collections.abc import Iterable
from itertools import zip_longest
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import in_units
from pipeline.views.stage_logs import Prediction, read_prediction
from tui.panes.numbers import numbers
from tui.panes.pane import About, Pane
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis
from tui.panes.table import Column, Table
from tui.panes.text import say
from tui.screens.base import WorkbenchScreen
from tui.screens.monitor.charts import charts
from tui.services.machine.readings import Machine, ProcessReading

SPANS = {"2 minutes": 120.0, "10 minutes": 600.0, "1 hour": 3600.0}
LOW, TALL = 14, 32  # rows from which there is room for processes, between two charts
DRAWN = 1.5  # seconds, so that of the ticks each second one draws
MACHINE = About(
    "Machine",
    """\
CPU, memory and each NVIDIA GPU, read once a second since the program started; the present is at
the right. A line is green while the present is below half of what the machine has, yellow below
85%, red above. In a container the total is its limit.

The dashed line is what the running stage predicted for itself: on a GPU, its tensors at the peak
of a step and CUDA's context; on the CPU, in the chart of its own memory, its tensors and what the
process holds besides.
""",
)
PROCESSES = About(
    "Processes",
    """\
The stage that runs and the engine that answers prompts, each with the processes that they started,
and this program. 100% is one core. GPU memory is shown where the driver tells it by process.
""",
)
PANES = {"machine": MACHINE, "processes": PROCESSES}
Process = tuple[str, ProcessReading]


class MonitorScreen(WorkbenchScreen):
    """Draws what `Machine` has read, every other second while it is shown."""

    NAME = "monitor"
    PANES = PANES
    HELP = """\
What the machine does: CPU, memory and GPUs over time, and what the project's processes take of
them. `t` shows a longer time, up to an hour.
"""
    CSS_PATH = "monitor.tcss"
    AUTO_FOCUS = "#machine VerticalScroll"
    VERTICAL_BREAKPOINTS = [(0, "-short"), (LOW, "-low"), (TALL, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [Binding("t", "span", "time span", id="monitor.span")]

    def __init__(self) -> None:
        super().__init__()
        self.span = next(iter(SPANS))
        self._next = 0.0  # when it is drawn again
        self.charts, self.problem = VerticalScroll(), Static(id="problem", markup=False)
        self.processes = Table[Process](key=lambda process: process[0])
        self.columns = [
            Column("process", self._process, fills=True),
            numbers("CPU", lambda process: process[1].cpu, "{:.1%}".format, width=8),
            numbers("memory", lambda process: process[1].memory, in_units, width=13),
            numbers("GPU", lambda process: process[1].gpu_memory, in_units, width=13),
        ]

    def body(self) -> Iterable[Widget]:
        with Vertical():
            yield self.pane("machine", self.charts)
            yield self.problem
            yield self.pane("processes", self.processes)

    def action_span(self) -> None:
        """The next longer time span; after the longest, the shortest."""
        names = list(SPANS)
        self.span = names[(names.index(self.span) + 1) % len(names)]
        self._show()

    @property
    def stage(self) -> str:
        """The stage that runs, or ""."""
        running = self.workbench.project_watch.running
        return running.stage.name if running else ""

    @property
    def prediction(self) -> Prediction | None:
        """What the stage that runs predicted."""
        watch = self.workbench.project_watch
        if watch.project is None or self.stage not in watch.states:
            return None
        return read_prediction(watch.project.run_folder(self.stage), watch.states[self.stage].run)

    def files_changed(self) -> None:
        self._show()  # it is shown again

    def tick(self) -> None:
        if time.time() >= self._next:
            self._show()

    def _show(self) -> None:
        """Show the present."""
        self._next = time.time() + DRAWN
        machine = self.workbench.machine
        late = ""
        if not machine.samples:
            late = "Reading the machine …"
        elif machine.last is None:
            late = "No reading for some seconds: the machine is very busy, or a driver hangs."
        problems = [*filter(None, (machine.problem, machine.gpu_problem, late))]
        say(self.problem, "\n".join(problems))
        self.problem.set_class(not problems, "-empty")
        device = machine.name if machine.gpus else ""
        facts = f"{machine.cores:g} cores", device, f"last {self.span}"
        self.query_one("#machine", Pane).show_title(*facts)
        prediction = self.prediction
        self.query_one("#processes", Pane).show_title(_note(self.stage, prediction))
        if machine.samples:
            self._show_charts(machine, prediction)
            processes = machine.samples[-1].processes
            columns = self.columns if machine.gpus else self.columns[:-1]
            self.processes.show(list(processes.items()), columns)

    def _process(self, process: Process) -> Content:
        """The name of a process; the stage that runs is marked."""
        name, _ = process
        return Content.styled(f"▶ {name}", "bold") if name == self.stage else Content(f"  {name}")

    def _show_charts(self, machine: Machine, prediction: Prediction | None) -> None:
        seconds = SPANS[self.span]
        recent = machine.samples[-round(seconds) :]
        found = charts(machine, recent, self.stage, prediction)
        shown = list(self.charts.query(Plot))
        missing = [Plot() for _ in found[len(shown) :]]
        self.charts.mount(*missing)
        now = time.time()
        for chart, plot in zip_longest(found, [*shown, *missing]):
            plot.can_focus, plot.display = False, chart is not None
            if chart:
                x = Axis(range=(now - seconds, now), shown=False)
                plot.show(chart.series, x, chart.y, head=chart.head)


def _note(stage: str, prediction: Prediction | None) -> str:
    """What the stage that runs predicted of its memory."""
    if not stage:
        return "No stage runs. R runs the pipeline."
    if prediction is None:
        return ""
    measured, predicted = prediction.measured, in_units(prediction.predicted)
    after = f"{in_units(measured)} measured" if measured else "not measured yet"
    return f"{predicted} of tensors predicted at the peak, {after}"
