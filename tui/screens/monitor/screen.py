"""The monitor: CPU, memory and GPUs over time, what the running stage predicted, and the processes
of the project.
"""

import time
from collections.abc import Iterable, Sequence
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
from tui.screens.base import WorkbenchScreen
from tui.screens.monitor.series import Series, bars, machine_series
from tui.services.machine.readings import ProcessReading, Sample
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
        y = Axis(range=(0, series.high), shown=False)
        drawn: list[Bars | Rule] = [Bars(partial(bars, series, now, seconds))]
        if series.level and not is_low:
            drawn.append(Rule(y=series.level, style="$accent"))
        self.plot.show(drawn, Axis(shown=False), y)
        first, *others = filter(None, series.facts)
        if series.level:
            others.insert(0, f"{LEVEL} {in_units(round(series.level))} predicted")
        parts = [Content.styled(first, "bold")]
        for fact in others:
            parts.append(Content.styled(fact, "$accent" if LEVEL in fact else "$foreground-muted"))
        self.facts.update(Content("  " if is_low else "\n").join(parts), layout=False)
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
        machine, samples = self.workbench.machine, self.workbench.machine.samples
        if self.stage:
            self._read_prediction(self.stage)
        else:
            self.prediction = None
        late = waiting = ""
        if not samples:
            waiting = "Reading the machine …"
        elif machine.last is None:
            late = "No reading for some seconds: the machine is very busy, or a driver hangs."
        problems = [machine.problem, machine.gpu_problem, late, waiting]
        _say(self.problem, "\n".join(filter(None, problems)))
        self.problem.set_class(not any(problems), "-empty")
        device = [machine.name] if machine.gpus and samples else []
        facts = [f"{machine.cores:g} cores", *device, f"last {self.span}"]
        self.query_one("#machine", Pane).show_title(*facts)
        if samples:
            self._show_charts(samples)
            self._show_processes(samples[-1])

    def _show_charts(self, samples: Sequence[Sample]) -> None:
        seconds, machine = SPANS[self.span], self.workbench.machine
        recent = [sample for sample in samples if sample.time > samples[-1].time - 2 * seconds]
        series, charts = machine_series(machine, recent, self.stage, self.prediction), self.charts
        shown = list(charts.query(Chart))
        missing = [Chart() for _ in series[len(shown) :]]
        charts.mount(*missing)
        for number, chart in enumerate([*shown, *missing]):
            chart.display = number < len(series)
            if chart.display:
                chart.show(series[number], time.time(), seconds)

    def _show_processes(self, sample: Sample) -> None:
        """A row per process, and what the stage predicted of its memory."""
        processes, stage = sample.processes, self.stage
        self.processes.show(list(processes.items()), columns(processes.values(), stage))
        note = "" if stage else "No stage runs. R runs the pipeline."
        if stage and self.prediction:
            measured, predicted = self.prediction.measured, in_units(self.prediction.predicted)
            after = f"{in_units(measured)} measured" if measured else "not measured yet"
            note = f"{predicted} of tensors predicted at the peak of a step, {after}"
        _say(self.note, note)

    @work(thread=True, exclusive=True, group="prediction")
    def _read_prediction(self, stage: str) -> None:
        watch = self.workbench.project_watch
        if watch.project and (state := watch.states.get(stage)):
            self.prediction = read_prediction(watch.project.run_folder(stage), state.run)


def _say(static: Static, text: str) -> None:
    """Show a text; only another one, as it lays out the screen."""
    if str(static.content) != text:
        static.update(text)


def columns(readings: Iterable[ProcessReading], stage: str) -> list[Column[Process]]:
    """Name, cores' worth of CPU time, memory; the stage that runs is marked."""
    known = list(readings)
    unit = unit_of(reading.memory for reading in known)
    on_gpu = [reading.gpu_memory for reading in known if reading.gpu_memory]
    gpu_unit = unit_of(on_gpu)

    def name(process: Process) -> Content:
        is_stage = process[0] == stage
        text = f"{'▶' if is_stage else ' '} {process[0]}"
        return Content.styled(text, "bold" if is_stage else "")

    def cpu(process: Process) -> str:
        share = process[1].cpu
        return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"

    def gpu(process: Process) -> str:
        memory = process[1].gpu_memory
        return "" if memory is None else gpu_unit.format(memory)

    found = [
        Column("process", name, fills=True),
        Column("CPU", cpu, width=8, right=True),
        Column(
            f"memory, {unit}", lambda process: unit.format(process[1].memory), width=13, right=True
        ),
    ]
    return [*found, Column(f"GPU, {gpu_unit}", gpu, width=13, right=True)] if on_gpu else found
