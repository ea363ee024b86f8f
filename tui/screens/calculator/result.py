"""The calculator's result as lines: whether it fits, what else fits, memory by method, formulas.

Bars tell the parts of memory apart by texture, always in the same order; colour says only whether a
part is there for the whole step or during it.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from textual.content import Content

from pipeline.calc.fit import LARGEST, gpus
from pipeline.calc.memory import Memory
from pipeline.calc.report import capped, explain, notes_on, smallest
from pipeline.files.text import in_units
from pipeline.views.calculation import Advice, Peaks, Result
from tui.panes.lines import MUTED
from tui.panes.table import fitted
from tui.screens.calculator.units import format_count_change, percent, unit_of
from tui.widgets.cells import bar, method_sign
from tui.widgets.colors import share_style

WHOLE, DURING = "$primary", "$secondary"  # the whole step, or a part of it
PARTS = {  # part of memory → its texture and colour
    "weights": ("█", WHOLE),
    "adapter": ("◆", WHOLE),
    "gradients": ("▓", DURING),
    "optimizer": ("▒", WHOLE),
    "activations": ("░", DURING),
    "logits": ("≡", DURING),
    "overhead": ("·", "$foreground 60%"),
}
EDGE = "│"  # where the GPU ends
CUT = "»"  # a bar that goes on
FAR = 20  # times the longest bar: a GPU that is larger lies beyond the chart
MARKS = "①②"  # of pinned configurations
CELL, WIDE = 7, 12  # of a number in a table, below a name
HARD = "\N{NO-BREAK SPACE}"
BAD, GOOD = "$text-error", "$text-success"


def _muted(text: str) -> Content:
    return Content.styled(text, MUTED)


def _bold(text: str) -> Content:
    return Content.styled(text, "bold")


def verdict(result: Result, pins: Sequence[Result], width: int) -> Iterator[Content]:
    """Whether it fits, with what is free; used of total as a bar; what is trained; and the same of
    what is pinned.
    """
    peak, total, spare = result.memory.peak, result.device.bytes, in_units(abs(result.spare))
    words, style = f"✓ FITS  {spare} free", f"{GOOD} on $success-muted"
    if result.spare < 0:
        words, style = f"✗ DOES NOT FIT  {spare} too much", f"{BAD} on $error-muted"
    yield Content.styled(words.center(width), f"bold {style}")
    yield usage_bar(peak, total, width)
    where = (f" · peak in {result.memory.where}", MUTED)
    yield Content.assemble((in_units(peak), "bold"), f" of {in_units(total)}", where)
    yield Content(f"{result.trainable:,} trainable, {percent(result.share)}")
    unit = unit_of(each.memory.peak for each in (*pins, result))
    for mark, pin in zip(MARKS, pins, strict=False):
        yield _bold(f"{mark} {pin.title}")
        size, change = pin.memory.peak, format_count_change(pin.trainable - result.trainable)
        more = f"{unit.format(size)} {unit} ({unit.format_change(size - peak)})"
        yield _muted(f"  {more} · {pin.trainable:,} trainable ({change})")


def usage_bar(used: int, total: int, width: int) -> Content:
    """The share that is used, coloured by it; what is too much follows in another texture."""
    filled = bar(min(used, total) / max(used, total), width).rstrip()
    rest, style = ("▒", "$error") if used > total else ("░", "$foreground 20%")
    return Content.assemble(
        (filled, share_style(used / total)), (rest * (width - len(filled)), style)
    )


def answers(result: Result, advice: Advice, width: int) -> Iterator[Content]:
    """The largest batch, sequence and rank, each alone; what to change; other values; GPUs."""
    sizes = advice.largest._asdict().items()
    most = [f"{key} {capped(size, LARGEST.get(key))}" for key, size in sizes if size is not None]
    yield Content.assemble(("at most  ", MUTED), " │ ".join(most))
    if result.spare < 0:
        change = "no setting does"
        if advice.changes:
            words, peak = advice.changes[-1]
            enough = ", still too much" if peak > result.device.bytes else ""
            change = f"{words.replace('--', '')} → {in_units(peak)}{enough}"
        yield Content.assemble(("to make it fit  ", MUTED), (change, "bold"))
    yield Content.assemble(("smallest GPU  ", MUTED), smallest(result.memory.peak))
    for key, peaks in advice.sweeps.items():
        yield from _sweep(result, key, peaks, width)
    for sign, style, holds in (("✓", "", True), ("✗", MUTED, False)):
        cards = [gpu for gpu in gpus().values() if (gpu.bytes >= result.memory.peak) == holds]
        # a label is not broken
        labels = [gpu.label.replace(" ", HARD) for gpu in cards]
        lines = textwrap.wrap(f"{HARD}· ".join(labels), max(width - 2, 12))
        for line, before in zip(lines, [sign, *" " * len(lines)], strict=False):
            yield Content.styled(f"{before} {line}", style)


def _sweep(result: Result, key: str, peaks: Peaks, width: int) -> list[Content]:
    """Two lines: the values of a setting, and the peak with each."""
    values, now = list(peaks), result.value(key)
    if not values:
        return []
    unit = unit_of(peak or 0 for peak in peaks.values())
    # as many as there is room for, the present one among them
    count = max((width - 9) // (CELL + 1), 1)
    start = max(min(values.index(now) - count // 2, len(values) - count), 0)
    first, second = [(f"{key:9}", "bold")], [(f"{unit!s:9}", MUTED)]
    for value in values[start : start + count]:
        peak, mark = peaks[value], "▶" * (value == now)
        text = "–" if peak is None else unit.format(peak)
        sign, style = ("✗", BAD) if peak and peak > result.device.bytes else (" ", "")
        first.append((f"{mark}{value:,}".rjust(CELL) + " ", "bold $accent" if mark else ""))
        second.append((f"{text:>{CELL}}{sign}", style))
    return [Content.assemble(*first), Content.assemble(*second)]


def memory(result: Result, pins: Sequence[Result], width: int) -> Iterator[Content]:
    """Bars of memory, with the GPU's end, and the sizes of their parts; also of what is pinned."""
    columns, total = dict(result.columns), result.device.bytes
    for mark, pin in zip(MARKS, pins, strict=False):
        columns[mark] = (pin.method, pin.run, pin.memory)
    memories = {name: memory for name, (_, _, memory) in columns.items()}
    longest, left = max(each.peak for each in memories.values()), max(map(len, columns)) + 5
    unit, room = unit_of([longest]), max(width - left - CELL - 3, 10)
    # A bar that is much longer than the rest would shrink what the question is about.
    widest = min(max(total, longest), 2 * max(total, result.memory.peak))
    if total > FAR * longest:
        widest = longest
    edge = round(total / widest * (room - 1))
    yield _bold(f"{EDGE} {result.device.label}, {in_units(total)}")
    for name, (method, _, sizes) in columns.items():
        drawn, here = _stacked(sizes, widest, room), name == result.chosen
        if edge < room:
            drawn = drawn[:edge] + _bold(EDGE) + drawn[edge + 1 :]
        yield Content.assemble(
            "▶ " if here else "  ",
            method_sign(method.name),
            (f" {name:{left - 4}}", "bold" * here),
            drawn,
            (f" {unit.format(sizes.peak):>{CELL}}", "bold" * here),
            " ✗" * (sizes.peak > total),
        )
    yield Content()
    yield from _parts(memories, result.chosen, width)


def _stacked(memory: Memory, widest: int, width: int) -> Content:
    """The parts one after the other."""
    # Each part ends at the rounded sum of the parts so far, so that rounding does not add up.
    drawn, done = Content(), 0
    for part, size in memory.parts().items():
        texture, style = PARTS[part]
        done += size
        drawn += Content.styled(texture * (round(done / widest * width) - len(drawn)), style)
    if done > widest:
        drawn = drawn[: width - 1] + _bold(CUT)
    return fitted(drawn, width)


def _parts(memories: Mapping[str, Memory], chosen: str, width: int) -> Iterator[Content]:
    """The legend with the size of each part: of the chosen method, then of others, as many as there
    is room for.
    """
    unit = unit_of(memory.peak for memory in memories.values())
    names = sorted(memories, key=lambda name: name != chosen)
    names = names[: max((width - 14) // WIDE, 1)]
    heads = "".join(f"{name:>{WIDE}}" for name in names)
    yield _bold(f"{f'{unit} at peak':14}{heads}")
    for part, look in PARTS.items():
        sizes = [memories[name].parts()[part] for name in names]
        if any(sizes):
            cells = "".join(f"{unit.format(size):>{WIDE}}" for size in sizes)
            yield Content.assemble(look, f" {part:12}{cells}")


def details(result: Result, _: int) -> Iterator[Content]:
    """The rule of thumb's count, notes, and the formula of each number."""
    rule = result.method.simple_count(result.model)
    if rule is not None:
        counts = f"{rule:,} · exact {result.trainable:,}"
        yield Content.assemble(("rule of thumb  ", "bold"), counts)
    for note in notes_on(result.model, result.method):
        yield _muted(f"note: {note}")
    for what, formula in explain(result.model, result.method, result.run, result.memory):
        yield Content.assemble((f"{what}  ", "bold"), formula)
