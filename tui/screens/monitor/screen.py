"""The monitor: CPU, memory and GPUs over time, what the running stage predicted, and the processes
of the project.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import in_units
from pipeline.views.stage_logs import Prediction, read_prediction
from tui.panes.pane import About, Pane
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis, Bars, Rule
from tui.panes.table import Column, Table
from tui.panes.text import say
from tui.screens.base import WorkbenchScreen
from tui.screens.monitor.series import Series, bars, machine_series
from tui.services.machine.readings import Machine, ProcessReading
from tui.widgets.units import unit_of

SPANS = {"2 minutes": 120.0, "10 minutes": 600.0, "1 hour": 3600.0}
LOW, TALL = 14, 32  # rows from which there is room for processes, between two charts
LEVEL = "╌"
MACHINE = About(
    "Machine",
    """\
CPU, memory and each NVIDIA GPU, read once a second since the program started; the present is at
the right, a column is the highest value of its time. Green is below half of what the machine has,
yellow below 85%, red above. In a container the total is its limit.

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


class Chart(Horizontal):
    """A quantity over time: its name, bars coloured by load, and its present value."""

    def __init__(self) -> None:
        super().__init__()
        self.label = Static(markup=False, classes="label")
        self.facts = Static(markup=False, classes="facts")
        self.plot = Plot()
        self.plot.can_focus = False

    def compose(self) -> Iterable[Widget]:
        yield from (self.label, self.plot, self.facts)

    def show(self, series: Series, now: float, seconds: float) -> None:
        is_low = self.size.height < 2
        drawn: list[Bars | Rule] = [Bars(partial(bars, series, now, seconds))]
        first, *others = filter(None, series.facts)
        facts = [Content.styled(first, "bold")]
        if series.level:
            drawn += [Rule(y=series.level, style="$accent")] * (not is_low)
            predicted = f"{LEVEL} {in_units(round(series.level))} predicted"
            facts.append(Content.styled(predicted, "$accent"))
        facts += [Content.styled(fact, "$foreground-muted") for fact in others]
        y = Axis(range=(0, series.high or series.full), shown=False)
        self.plot.show(drawn, Axis(shown=False), y)
        self.facts.update(Content("  " if is_low else "\n").join(facts), layout=False)
        self.label.update(series.label, layout=False)


class MonitorScreen(WorkbenchScreen):
    """Draws what `Machine` has read, once a second while it is shown."""

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
        self.prediction: Prediction | None = None  # of the stage that runs
        self.charts, self.problem = VerticalScroll(), Static(id="problem", markup=False)
        self.processes = Table[Process](key=lambda process: process[0])
        self.note = Static(id="note", markup=False)

    def body(self) -> Iterable[Widget]:
        with Vertical():
            yield self.pane("machine", self.charts)
            yield self.problem
            yield self.pane("processes", self.processes, self.note)

    def action_span(self) -> None:
        """The next longer time span; after the longest, the shortest."""
        names = list(SPANS)
        self.span = names[(names.index(self.span) + 1) % len(names)]
        self.tick()

    @property
    def stage(self) -> str:
        """The stage that runs, or ""."""
        running = self.workbench.project_watch.running
        return running.stage.name if running else ""

    def files_changed(self) -> None:
        self.tick()  # it is shown again

    def tick(self) -> None:
        """Draw the present."""
        machine = self.workbench.machine
        if self.stage:
            self._read_prediction(self.stage)
        else:
            self.prediction = None
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
        if machine.samples:
            self._show_charts(machine)
            self._show_processes(machine.samples[-1].processes)

    def _show_charts(self, machine: Machine) -> None:
        seconds = SPANS[self.span]
        recent = machine.samples[-round(2 * seconds) :]
        series = machine_series(machine, recent, self.stage, self.prediction)
        shown = list(self.charts.query(Chart))
        missing = [Chart() for _ in series[len(shown) :]]
        self.charts.mount(*missing)
        for number, chart in enumerate([*shown, *missing]):
            chart.display = number < len(series)
            if chart.display:
                chart.show(series[number], time.time(), seconds)

    def _show_processes(self, processes: Mapping[str, ProcessReading]) -> None:
        """A row per process, and what the stage predicted of its memory."""
        self.processes.show(list(processes.items()), columns(processes.values(), self.stage))
        note = "" if self.stage else "No stage runs. R runs the pipeline."
        if self.stage and self.prediction:
            measured, predicted = self.prediction.measured, in_units(self.prediction.predicted)
            after = f"{in_units(measured)} measured" if measured else "not measured yet"
            note = f"{predicted} of tensors predicted at the peak of a step, {after}"
        say(self.note, note)

    @work(thread=True, exclusive=True, group="prediction")
    def _read_prediction(self, stage: str) -> None:
        watch = self.workbench.project_watch
        if watch.project and (state := watch.states.get(stage)):
            self.prediction = read_prediction(watch.project.run_folder(stage), state.run)


def columns(readings: Collection[ProcessReading], stage: str) -> list[Column[Process]]:
    """Name, cores' worth of CPU time, memory; the stage that runs is marked."""
    unit = unit_of(reading.memory for reading in readings)
    on_gpu = [reading.gpu_memory for reading in readings if reading.gpu_memory]
    gpu_unit = unit_of(on_gpu)

    def name(process: Process) -> Content:
        sign, style = ("▶", "bold") if process[0] == stage else (" ", "")
        return Content.styled(f"{sign} {process[0]}", style)

    def cpu(process: Process) -> str:
        share = process[1].cpu
        return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"

    def memory(process: Process) -> str:
        return unit.format(process[1].memory)

    def gpu(process: Process) -> str:
        size = process[1].gpu_memory
        return "" if size is None else gpu_unit.format(size)

    found = [Column("process", name, fills=True), Column("CPU", cpu, width=8, right=True)]
    found.append(Column(f"memory, {unit}", memory, width=13, right=True))
    if on_gpu:
        found.append(Column(f"GPU, {gpu_unit}", gpu, width=13, right=True))
    return found
