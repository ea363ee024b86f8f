"""The monitor: CPU, memory and GPUs over time, what the running stage predicted, and the processes
of the project.
"""

import time
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import in_units
from tui.screens.base import WorkbenchScreen
from tui.screens.monitor.charts import Charts
from tui.screens.monitor.prediction import Prediction, read_prediction
from tui.screens.monitor.series import machine_series
from tui.services.machine.readings import Sample
from tui.widgets.drawing import Drawing, Lines
from tui.widgets.pane import Pane
from tui.widgets.text import cells
from tui.widgets.units import unit_of

SPANS = {"2 minutes": 120.0, "10 minutes": 600.0, "1 hour": 3600.0}
MUTED = "$foreground 65%"


class MachinePane(Pane, can_focus=True):
    TITLE = "Machine"
    HELP = """\
CPU, memory and each NVIDIA GPU, read once a second since the program started; the present is at
the right, a column is the highest value of its time. Green is below half of what the machine has,
yellow below 85%, red above. In a container the total is its limit.

The dashed line is what the running stage predicted for itself: on a GPU, its tensors at the peak
of a step and CUDA's context; on the CPU, in the chart of its own memory, its tensors and what the
process holds besides.
"""


class ProcessesPane(Pane, can_focus=True):
    TITLE = "Processes"
    HELP = """\
The stage that runs and the engine that answers prompts, each with the processes that they started,
and this program. 100% is one core. GPU memory is shown where the driver tells it by process.
"""


class MonitorScreen(WorkbenchScreen):
    """Draws what `Machine` has read, once a second while it is shown."""

    NAME: ClassVar[str] = "monitor"
    HELP = """\
What the machine does: CPU, memory and GPUs over time, and what the project's processes take of
them. `t` shows a longer time, up to an hour.
"""
    CSS_PATH = "monitor.tcss"
    AUTO_FOCUS = "#machine"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("t", "span", "time span", id="monitor.span")]

    def __init__(self) -> None:
        super().__init__()
        self.span = next(iter(SPANS))
        self.prediction: Prediction | None = None  # of the stage that runs
        self._title: tuple[str, ...] = ()

    def body(self) -> Iterable[Widget]:
        with Vertical():
            yield MachinePane(VerticalScroll(Charts(), can_focus=False), id="machine")
            yield Static(id="problem", markup=False)
            yield ProcessesPane(Drawing(), id="processes")

    def on_mount(self) -> None:
        self.tick()

    def files_changed(self) -> None:
        """It is shown again."""
        self.tick()

    def action_span(self) -> None:
        """The next longer time span; after the longest, the shortest."""
        names = list(SPANS)
        self.span = names[(names.index(self.span) + 1) % len(names)]
        self.tick()

    @property
    def _stage(self) -> str:
        running = self.workbench.project_watch.running
        return running.stage.name if running else ""

    def tick(self) -> None:
        """Draw the present."""
        machine, samples = self.workbench.machine, self.workbench.machine.samples
        charts = self.query_one(Charts)
        facts = [f"{machine.cores:g} cores"]
        if samples:
            seconds = SPANS[self.span]
            recent = [sample for sample in samples if sample.time > samples[-1].time - 2 * seconds]
            charts.show(
                machine_series(machine, recent, self._stage, self.prediction), time.time(), seconds
            )
            self.query_one(Drawing).show(
                partial(process_lines, samples[-1], self._stage, self.prediction)
            )
            facts += [machine.name] if machine.gpus else []
        if (title := (*facts, f"last {self.span}")) != self._title:
            self.query_one(MachinePane).show_title(*title)  # draws the whole pane
            self._title = title
        self._show_problem(
            "" if samples else "Reading the machine …", bool(samples) and machine.last is None
        )
        if self._stage:
            self._read_prediction(self._stage)
        else:
            self.prediction = None

    def _show_problem(self, waiting: str, is_late: bool) -> None:
        """What cannot be read, in one sentence each; no line if all is read."""
        machine = self.workbench.machine
        late = (
            "No reading for some seconds: the machine is very busy, or a driver hangs."
            if is_late
            else ""
        )
        text = "\n".join(filter(None, [machine.problem, machine.gpu_problem, late, waiting]))
        problem = self.query_one("#problem", Static)
        if str(problem.content) != text:
            problem.update(text)
        problem.display = bool(text)

    @work(thread=True, exclusive=True, group="prediction")
    def _read_prediction(self, stage: str) -> None:
        watch = self.workbench.project_watch
        if watch.project and (state := watch.states.get(stage)):
            self.prediction = read_prediction(watch.project.run_folder(stage), state.run)


def process_lines(sample: Sample, stage: str, prediction: Prediction | None, width: int) -> Lines:
    """A row per process, and what the stage predicted of its memory."""
    processes = sample.processes
    unit = unit_of(reading.memory for reading in processes.values())
    on_gpu = [reading.gpu_memory for reading in processes.values() if reading.gpu_memory]
    gpu_unit = unit_of(on_gpu)
    widths = [-min(max(map(len, ("process", *processes))) + 2, max(width - 36, 10)), 8, 13, 13]
    heading = ["process", "CPU", f"memory, {unit}", f"GPU, {gpu_unit}" if on_gpu else ""]
    lines = [Content.styled(cells(heading, widths).rstrip(), MUTED)]
    for name, reading in processes.items():
        share = f"{reading.cpu:.0%}" if reading.cpu >= 0.1 else f"{reading.cpu:.1%}"
        gpu = (
            gpu_unit.format(reading.gpu_memory) if on_gpu and reading.gpu_memory is not None else ""
        )
        row = cells(
            [f"{'▶' if name == stage else ' '} {name}", share, unit.format(reading.memory), gpu],
            widths,
        )
        lines.append(Content.styled(row.rstrip(), "bold" if name == stage else ""))
    if not stage:
        lines.append(Content.styled("No stage runs. R runs the pipeline.", MUTED))
    elif prediction:
        measured = (
            f"{in_units(prediction.measured)} measured"
            if prediction.measured
            else "not measured yet"
        )
        text = (
            f"{in_units(prediction.predicted)} of tensors predicted at the peak of a step, "
            f"{measured}"
        )
        lines.append(Content.styled(text, MUTED))
    return lines
