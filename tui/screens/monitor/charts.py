"""What the monitor draws: a quantity over time, and what is said of its present value."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.files.text import in_units
from pipeline.views.stage_logs import Prediction
from tui.panes.plot.plot import Head
from tui.panes.plot.series import XY, Axis, Line, Rule, Series
from tui.services.machine.nvml import GpuReading
from tui.services.machine.readings import Machine, Sample
from tui.widgets.colors import share_style

LEVEL = "╌"  # as a rule is drawn


class Chart(NamedTuple):
    """`full`: all that the machine has of it, by which it is coloured; it is at the top unless
    `high` is. `level`: a predicted value, 0 for none.
    """

    name: str
    fact: str  # the present value, and what belongs to it
    points: Sequence[XY]
    full: float
    level: int = 0
    high: float = 0.0

    @property
    def style(self) -> str:
        return share_style(self.points[-1][1] / self.full) if self.points else ""

    @property
    def head(self) -> Head:
        predicted = f"  {LEVEL} {in_units(self.level)} predicted" if self.level else ""
        return Head(self.name, self.fact + predicted, self.style)

    @property
    def series(self) -> list[Series]:
        rules = [Rule(y=self.level, style="$accent")] if self.level else []
        return [Line(self.points, self.style), *rules]

    @property
    def y(self) -> Axis:
        return Axis(range=(0, self.high or self.full), shown=False)


def charts(
    machine: Machine, samples: Sequence[Sample], stage: str, prediction: Prediction | None
) -> list[Chart]:
    """CPU and memory, each GPU's load and memory, then the memory of the stage that runs."""
    last, whole = samples[-1], machine.memory
    cpu = [(sample.time, sample.cpu) for sample in samples]
    memory = [(sample.time, sample.memory) for sample in samples]
    used = _of(last.memory, whole) + "  container's limit" * machine.limited
    found = [
        Chart("cpu", f"{last.cpu:.0%} of {machine.cores:g} cores", cpu, 1),
        Chart("memory", used, memory, whole),
    ]
    for index, gpu in enumerate(machine.gpus):
        readings = [(sample.time, sample.gpus[index]) for sample in samples]
        found += _of_gpu(f"GPU {index} {gpu.name}", gpu.memory, readings, prediction)
    if stage in last.processes:
        sizes = [(s.time, s.processes[stage].memory) for s in samples if stage in s.processes]
        level = prediction.of_process if prediction else 0
        high = 1.1 * max(level, *(size for _, size in sizes))
        fact = f"{in_units(last.processes[stage].memory)} of the process"
        found.append(Chart(stage, fact, sizes, whole, level, high))
    return found


def _of_gpu(
    name: str,
    whole: int,
    readings: Sequence[tuple[float, GpuReading]],
    prediction: Prediction | None,
) -> list[Chart]:
    now = readings[-1][1]
    facts = ["–" if now.load is None else f"{now.load:.0%}"]
    facts += [] if now.temperature is None else [f"{now.temperature} °C"]
    facts += [] if now.power is None else [f"{now.power:.0f} W"]
    loads = [(time, gpu.load) for time, gpu in readings if gpu.load is not None]
    memory = [(time, gpu.memory) for time, gpu in readings if gpu.memory is not None]
    level = prediction.on_gpu if prediction else 0
    return [
        Chart(name, "  ".join(facts), loads, 1),
        Chart("  memory", _of(now.memory, whole), memory, whole, level),
    ]


def _of(used: int | None, whole: int) -> str:
    if used is None:
        return f"– of {in_units(whole)}"
    return f"{in_units(used)} of {in_units(whole)}, {used / whole:.0%}"
