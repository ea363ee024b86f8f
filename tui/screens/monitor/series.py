"""What the monitor draws: a quantity over time, in columns of equal duration."""

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

from pipeline.files.text import in_units
from pipeline.views.stage_logs import Prediction
from tui.services.machine.nvml import GpuReading
from tui.services.machine.readings import Machine, Sample
from tui.widgets.colors import share_style
from tui.widgets.units import unit_of

Values = Sequence[tuple[float, float]]  # time, value; only where one was read


class Series(NamedTuple):
    """`full`: the value that is all of the machine's, by which it is coloured; it is at the top
    unless `high` is.

    `facts`: the present value, then what belongs to it. `level`: a predicted value, 0 for none.
    """

    label: str
    values: Values
    full: float
    facts: tuple[str, ...]
    level: float = 0.0
    high: float = 0.0


def machine_series(
    machine: Machine, samples: Sequence[Sample], stage: str, prediction: Prediction | None
) -> list[Series]:
    """CPU and memory, each GPU's load and memory, then the memory of the stage that runs."""
    last, whole = samples[-1], machine.memory
    load = f"{last.cpu:.0%}", f"of {machine.cores:g} cores"
    used = (*_of(last.memory, whole), "container's limit" if machine.limited else "")
    series = [
        Series("cpu", _values(samples, lambda s: s.cpu), 1, load),
        Series("memory", _values(samples, lambda s: s.memory), whole, used),
    ]
    for index, gpu in enumerate(machine.gpus):
        readings = [(sample.time, sample.gpus[index]) for sample in samples]
        series += _gpu_series(f"GPU {index} {gpu.name}", gpu.memory, readings, prediction)
    if stage in last.processes:
        of_stage = [sample for sample in samples if stage in sample.processes]
        values = _values(of_stage, lambda s: s.processes[stage].memory)
        level = prediction.of_process if prediction else 0
        high = 1.1 * max(level, *(value for _, value in values))
        facts = in_units(last.processes[stage].memory), "of the process"
        series.append(Series(stage, values, whole, facts, level, high))
    return series


def _gpu_series(
    label: str,
    whole: int,
    readings: Sequence[tuple[float, GpuReading]],
    prediction: Prediction | None,
) -> list[Series]:
    now = readings[-1][1]
    heat = "" if now.temperature is None else f"{now.temperature} °C"
    power = "" if now.power is None else f"{now.power:.0f} W"
    load = "–" if now.load is None else f"{now.load:.0%}"
    loads = [(time, gpu.load) for time, gpu in readings if gpu.load is not None]
    memory = [(time, gpu.memory) for time, gpu in readings if gpu.memory is not None]
    level = float(prediction.on_gpu) if prediction else 0.0
    return [
        Series(label, loads, 1, (load, f"{heat}  {power}".strip())),
        Series("  memory", memory, whole, _of(now.memory, whole), level),
    ]


def _values(samples: Sequence[Sample], get: Callable[[Sample], float]) -> Values:
    return [(sample.time, get(sample)) for sample in samples]


def _of(used: int | None, total: int) -> tuple[str, str]:
    unit = unit_of([total])
    if used is None:
        return "–", f"of {unit.format(total)} {unit}"
    return f"{unit.format(used)} {unit}", f"of {unit.format(total)}, {used / total:.0%}"


def columns(values: Values, end: float, seconds: float, width: int) -> list[float | None]:
    """The largest value in each of `width` columns that end at `end`; None where there is none.

    The largest, as a short peak of memory is what a run fails at. Where a column is shorter than
    the time between two readings, the value before holds.
    """
    tops, start = dict[int, float](), end - seconds
    for time, value in values:
        if time >= start:
            column = min(int((time - start) / seconds * width), width - 1)
            tops[column] = max(value, tops.get(column, value))
    held = max(round(1.5 * width / seconds), 1)
    found = list[float | None]()
    for column in range(width):
        before = (at for at in range(column, column - held - 1, -1) if at in tops)
        found.append(tops.get(next(before, -1)))
    return found


def bars(series: Series, now: float, seconds: float, width: int) -> list[tuple[float | None, str]]:
    """The columns of the last `seconds`, coloured by load."""
    # The end of a column, so that a value stays in its column and the chart moves once a column.
    end = ceil(now / seconds * width) * seconds / width
    tops = columns(series.values, end, seconds, width)
    return [(top, "" if top is None else share_style(top / series.full)) for top in tops]
