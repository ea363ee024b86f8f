"""What else one asks of a configuration: the largest values that fit, other values, what to change,
which GPUs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from textual.content import Content

from pipeline.calc.fit import LARGEST, PRECISIONS_BY_QUALITY, Gpu, Largest, changes, gpus, largest
from pipeline.calc.memory import possible, predict
from pipeline.calc.method import FinetuningMethod
from pipeline.calc.report import capped
from pipeline.calc.settings import TrainingConfig
from pipeline.files.text import in_units
from tui.screens.calculator.query import Result
from tui.screens.calculator.result import MUTED
from tui.widgets.units import Unit, unit_of

SWEPT = {
    "rank": (1, 2, 4, 8, 16, 64),
    "batch": (1, 2, 4, 8, 16, 32),
    "sequence": tuple(2**n for n in range(15)),
}
COUNT = 6  # of values, the largest
LABEL = 10  # cells of the first column
NONE = "✗ none"  # of a setting that fits with no value

Peaks = Mapping[int, int | None]  # value of a setting → peak in bytes; None if it cannot be trained


class Advice(NamedTuple):
    """The results of the slow search: the largest values that fit, changes as (text, peak), and
    peaks by setting.
    """

    largest: Largest
    changes: Sequence[tuple[str, int]]
    sweeps: Mapping[str, Peaks]


def advise(result: Result) -> Advice:
    """A tenth of a second for a large model."""
    configuration = (result.model, result.method, result.run, result.device.bytes)
    ways = [] if result.spare >= 0 else changes(*configuration, result.methods)
    fixes = [(change, peak) for change, _, _, peak in ways]
    return Advice(
        largest(*configuration),
        fixes,
        {key: _peaks(result, key) for key in SWEPT if values_of(result, key)},
    )


def values_of(result: Result, key: str) -> Sequence[int]:
    """The values of a setting that are compared, with the present one; none if the method has no
    rank.
    """
    now = current(result, key)
    limit = result.model.context if key == "sequence" else LARGEST[key]
    return sorted({now, *[value for value in SWEPT[key] if value <= limit][-COUNT:]}) if now else ()


def current(result: Result, key: str) -> int:
    """The present value of a setting; 0 if the method has no rank."""
    value: int = getattr(result.method, "rank", 0) if key == "rank" else getattr(result.run, key)
    return value


def _peaks(result: Result, key: str) -> Peaks:
    return {value: _peak(result, *_with(result, key, value)) for value in values_of(result, key)}


def _with(result: Result, key: str, value: int) -> tuple[FinetuningMethod, TrainingConfig]:
    method, run = result.method, result.run
    if key == "rank":
        return method.with_rank(value) or method, run
    return method, replace(run, batch=value) if key == "batch" else replace(run, sequence=value)


def _peak(result: Result, method: FinetuningMethod, run: TrainingConfig) -> int | None:
    return predict(result.model, method, run).peak if possible(result.model, method, run) else None


def answers(result: Result, advice: Advice | None, width: int) -> Sequence[Content]:
    """The largest batch, sequence and rank, each alone; what to change; other values; GPUs that
    hold it.

    Without advice, for which the search still runs, its lines are kept free.
    """
    lines = [
        *_largest_lines(advice, width),
        _smaller_gpu(result, width),
        _advice_line(result, advice),
    ]
    for key in SWEPT:
        if values := values_of(result, key):
            lines += _sweep(key, values, result, advice, width)
    return [*lines, *_gpu_list(result, width)]


def _largest_lines(advice: Advice | None, width: int) -> Sequence[Content]:
    """One line if it fits the width, else two."""
    title = Content.styled("largest, one at a time", MUTED)
    if advice is None:
        line = Content.styled("…", MUTED)
    else:
        sizes = {
            "batch": advice.largest.batch,
            "sequence": advice.largest.sequence,
            "rank": advice.largest.rank,
        }
        found = [_setting(key, size) for key, size in sizes.items() if size is not None]
        line = Content.styled(" │ ", "$foreground 40%").join(found)
    # decided by what a line may need, so that the search changes no height
    return [Content.assemble(title, "  ", line)] if width >= 66 else [title, line]


def _setting(key: str, value: int) -> Content:
    if not value:
        return Content.assemble(f"{key} ", (NONE, "$text-error"))
    return Content.assemble(f"{key} ", (capped(value, LARGEST[key]), "bold"))


def _advice_line(result: Result, advice: Advice | None) -> Content:
    """What makes it fit; or the least quantized base that fits as well, if it is a better one."""
    if result.spare < 0:
        label = Content.styled("to make it fit  ", MUTED)
        if advice is None:
            return label + Content.styled("…", MUTED)
        if not advice.changes:
            return label + Content("no setting does")
        change, peak = advice.changes[-1]
        enough = "" if peak <= result.device.bytes else ", still too much"
        return Content.assemble(
            label, (change.replace("--", ""), "bold"), f" → {in_units(peak)}{enough}"
        )
    better = advice.largest.precision if advice else None
    ranking = {name: number for number, name in enumerate(PRECISIONS_BY_QUALITY)}
    if better and ranking[better] < ranking.get(result.run.precision, len(ranking)):
        return Content.assemble(
            ("a better base fits too  ", MUTED), ("precision ", ""), (better, "bold")
        )
    return Content()


def _smaller_gpu(result: Result, width: int) -> Content:
    """The smallest NVIDIA GPU that holds the peak; if the chosen one does, the smallest of those
    that are smaller.
    """
    cards = [
        gpu
        for name, gpu in gpus().items()
        if not name.startswith("mac-") and gpu.bytes >= result.memory.peak
    ]
    title = "smallest GPU"
    if result.spare >= 0:
        cards = [gpu for gpu in cards if gpu.bytes < result.device.bytes]
        title = "smaller GPU"
    title += " that holds it  " if width >= 60 else "  "
    name = f"{cards[0].label}, {in_units(cards[0].bytes)}" if cards else "none of these"
    return Content.assemble((title, MUTED), (name, "bold"))


def _sweep(
    key: str, values: Sequence[int], result: Result, advice: Advice | None, width: int
) -> Sequence[Content]:
    """Two lines: the values of a setting, and the peak with each."""
    peaks = advice.sweeps[key] if advice else {}
    unit = unit_of([peak for peak in peaks.values() if peak] or [result.memory.peak])
    cell = 8
    shown = _around(values, current(result, key), max((width - LABEL) // cell, 1))
    first, second = (
        Content.styled(key.ljust(LABEL), "bold"),
        Content.styled(f"{unit}".ljust(LABEL), MUTED),
    )
    for value in shown:
        is_now, peak = value == current(result, key), peaks.get(value)
        first += Content.styled(
            f"{'▶' if is_now else ''}{value:,} ".rjust(cell), "bold $accent" if is_now else ""
        )
        second += (
            _peak_cell(peak, unit, result.device, cell, is_now)
            if advice
            else Content("… ".rjust(cell))
        )
    return [first.rstrip(), second.rstrip()]


def _peak_cell(peak: int | None, unit: Unit, device: Gpu, cell: int, is_now: bool) -> Content:
    """The peak, with ✗ if it is more than the device has."""
    if peak is None:
        return Content("– ".rjust(cell))
    fits = peak <= device.bytes
    return Content.styled(
        f"{unit.format(peak)}{' ' if fits else '✗'}".rjust(cell),
        f"{'' if fits else '$text-error '}{'bold' * is_now}",
    )


def _around(values: Sequence[int], now: int, count: int) -> Sequence[int]:
    """At most `count` neighbours, `now` among them."""
    start = min(max(values.index(now) - count // 2, 0), max(len(values) - count, 0))
    return values[start : start + count]


def _gpu_list(result: Result, width: int) -> Sequence[Content]:
    """The known GPUs, smallest first: those that hold the peak, and those that do not."""
    lines = list[Content]()
    for sign, style, is_enough in (
        ("✓", "bold $text-success", True),
        ("✗", "bold $text-error", False),
    ):
        names = [
            gpu.label for gpu in gpus().values() if (gpu.bytes >= result.memory.peak) == is_enough
        ]
        lines += _list(Content.styled(f"{sign} ", style), names, width) if names else []
    return lines


def _list(sign: Content, names: Sequence[str], width: int) -> Sequence[Content]:
    """Names between middle dots, in lines of `width`; the lines after the first are indented."""
    lines, line = list[Content](), sign
    for index, name in enumerate(names):
        part = f"{name} · " if index + 1 < len(names) else name
        if line.cell_length + len(part.rstrip()) > width and line.cell_length > 2:
            lines.append(line.rstrip())
            line = Content("  ")
        line += Content(part)
    return [*lines, line]
