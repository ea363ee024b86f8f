"""What the monitor draws: a quantity over time, in columns of equal duration."""

from collections.abc import Callable, Sequence
from math import inf, isfinite, nan
from typing import NamedTuple

from pipeline.files.text import in_units
from tui.screens.monitor.prediction import Prediction
from tui.services.machine.nvml import GpuReading
from tui.services.machine.readings import Machine, Sample
from tui.widgets.units import unit_of

Values = Sequence[tuple[float, float]]  # time, value; only where one was read


class Series(NamedTuple):
    """`high`: the value at the top; `full`: the one that is all of the machine's, by which it is
    coloured.

    `facts`: the present value, then what belongs to it. `level`: a predicted value, 0 for none.
    """

    label: str
    values: Values
    high: float
    full: float
    facts: tuple[str, ...]
    level: float = 0.0


def machine_series(
    machine: Machine, samples: Sequence[Sample], stage: str, prediction: Prediction | None
) -> list[Series]:
    """CPU and memory, each GPU's load and memory, then the memory of the stage that runs."""
    last = samples[-1]
    series = []
    if last.cpu is not None:
        cores = f"of {machine.cores:g} cores"
        series.append(
            Series("cpu", _values(samples, lambda s: s.cpu), 1, 1, (_share(last.cpu), cores))
        )
    if last.memory is not None and machine.memory:
        limit = "container's limit" if machine.limited else ""
        values = _values(samples, lambda s: s.memory)
        series.append(
            Series(
                "memory",
                values,
                machine.memory,
                machine.memory,
                _of(last.memory, machine.memory, limit),
            )
        )
    for index, gpu in enumerate(machine.gpus):
        series += _gpu_series(index, gpu.name, gpu.memory, samples, prediction)
    if stage in last.processes and machine.memory:
        values = _values(
            samples, lambda s: s.processes[stage].memory if stage in s.processes else None
        )
        level = prediction.of_process if prediction else 0
        high = 1.1 * max(level, *(value for _, value in values))
        facts = (in_units(last.processes[stage].memory), "of the process")
        series.append(Series(stage, values, high, machine.memory, facts, level))
    return series


def _gpu_series(
    index: int, name: str, memory: int, samples: Sequence[Sample], prediction: Prediction | None
) -> list[Series]:
    def reading(sample: Sample) -> GpuReading:
        return sample.gpus[index] if index < len(sample.gpus) else GpuReading()

    now, label = reading(samples[-1]), f"GPU {index} {name}"
    heat = "" if now.temperature is None else f"{now.temperature} °C"
    power = "" if now.power is None else f"{now.power:.0f} W"
    facts = ("–" if now.load is None else _share(now.load), "  ".join(filter(None, (heat, power))))
    level = float(prediction.on_gpu) if prediction else 0.0
    return [
        Series(label, _values(samples, lambda s: reading(s).load), 1, 1, facts),
        Series(
            "  memory",
            _values(samples, lambda s: reading(s).memory),
            memory,
            memory,
            _of(now.memory, memory),
            level,
        ),
    ]


def _values(samples: Sequence[Sample], get: Callable[[Sample], float | None]) -> Values:
    return [(sample.time, value) for sample in samples if (value := get(sample)) is not None]


def _share(share: float) -> str:
    return f"{share:.0%}"


def _of(used: int | None, total: int, more: str = "") -> tuple[str, ...]:
    unit = unit_of([total])
    if used is None:
        return ("–", f"of {unit.format(total)} {unit}", more)
    return (f"{unit.format(used)} {unit}", f"of {unit.format(total)}, {used / total:.0%}", more)


def columns(values: Values, end: float, seconds: float, width: int) -> list[float]:
    """The largest value in each of `width` columns that end at `end`; nan where there is none.

    The largest, as a short peak of memory is what a run fails at.
    """
    tops, start = [-inf] * width, end - seconds
    for time, value in reversed(values):
        if time < start:
            break
        column = min(int((time - start) / seconds * width), width - 1)
        tops[column] = max(tops[column], value)
    return [
        top if isfinite(top) else nan
        for top in _bridged(tops, max(round(1.5 * width / seconds), 1))
    ]


def _bridged(tops: list[float], gap: int) -> list[float]:
    """Where a column is shorter than the time between two readings, the value before holds for
    `gap` columns.
    """
    left = 0
    for index, top in enumerate(tops):
        left = gap if isfinite(top) else left - 1
        if not isfinite(top) and index and left >= 0:
            tops[index] = tops[index - 1]
    return tops
