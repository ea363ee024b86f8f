"""The calculator's result: verdict, memory bars, parameter counts beside the document's, pinned configurations."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.text import Text

from pipeline.calc.fit import LARGEST, Gpu, Largest
from pipeline.calc.memory import PARTS, Memory
from pipeline.calc.method import projections, why_they_differ
from pipeline.calc.report import PROJECTION, SHADES, capped, cells_of, gib, smallest
from pipeline.project.logs.run_log import in_units
from tui.screens.calculator.query import Result
from tui.widgets.text import Lines, cells

SIGNS = dict(zip(PARTS, "█◆▓▒░≡·", strict=True))  # parts differ in symbol too, not only in colour
EDGE = "│"  # where the GPU ends
MARKS = "①②"  # of pinned configurations


class Advice(NamedTuple):
    """The results of the slow search: the largest values that fit, and changes that make it fit: (text, peak)."""

    largest: Largest
    changes: Sequence[tuple[str, int]]


class Verdict(Lines):
    """Trainable parameters, peak, whether it fits, and advice."""


def verdict(result: Result, advice: Advice | None, width: int) -> Sequence[Text]:
    """The lines; without advice, it is still being searched for."""
    peak, run = result.memory, result.run
    fits = result.spare >= 0
    text = f"✓ fits: {in_units(result.spare)} free" if fits else f"✗ does not fit: {in_units(-result.spare)} too much"
    return [
        Text.assemble((result.model.name, "bold"), f"  {result.model.total:,} parameters"),
        Text.assemble((result.method.title, "bold"), f"  {run.precision}, {run.batch} × {run.sequence:,}"),
        Text.assemble((f"{result.trainable:,} trainable", "bold"), f", {result.percent:.4g}%"),
        Text.assemble((f"peak {in_units(peak.peak)}", "bold"), f"  in {peak.where}"),
        Text.assemble((text, "bold green" if fits else "bold red"), f"  on {result.device.label}"),
        _format_advice(result, advice),
        *([Text()] if advice is None and width < 72 else []),  # advice takes two lines: keep its place
    ]


def _format_advice(result: Result, advice: Advice | None) -> Text:
    """The largest values that fit, or what to change."""
    if advice is None:
        return Text("looking for the most that fits …" if result.spare >= 0 else "looking for what to change …", "dim")
    if result.spare >= 0:
        largest = [f"{key} {capped(value, LARGEST.get(key))}" for key, value in vars(advice.largest).items() if value]
        return Text(f"the most that fits: {' · '.join(largest)}")
    if not advice.changes:
        return Text("no setting makes it fit; a larger device is needed: " + smallest(result.memory.peak))
    change, peak = advice.changes[-1]
    needed = "" if peak <= result.device.bytes else f"; still too much: {smallest(peak)} is needed"
    return Text(f"change this: {change.replace('--', '')} → {in_units(peak)}{needed}")


class MemoryBars(Lines):
    """Memory of several methods: bars against the size of a GPU, and a table of the parts."""


def memory(result: Result, width: int) -> Sequence[Text]:
    memories = {name: memory for name, (_, _, memory) in result.columns.items()}
    return [*bars(memories, result.chosen, result.device, width), Text(), *numbers(memories, result.chosen, width)]


def bars(memories: Mapping[str, Memory], chosen: str, device: Gpu, width: int) -> Sequence[Text]:
    """A bar per method; the first line marks the size of the device."""
    name_width = max(map(len, memories)) + 3
    bar_width = max(10, width - name_width - 12)
    widest = max(device.bytes, *(memory.peak for memory in memories.values()))
    edge = min(bar_width - 1, round(device.bytes / widest * bar_width))
    label = f"{device.label} {gib(device.bytes)} GiB"
    before = name_width + edge
    head = f"{label} ▼".rjust(before + 1) if len(label) + 1 < before else f"{' ' * before}▼ {label}"
    lines = [Text(head, "bold")]
    for name, memory in memories.items():
        # Each part ends at the rounded sum of the parts so far, so that rounding does not add up.
        bar, done = Text(), 0
        for part, size in memory.parts().items():
            done += size
            bar.append(SIGNS[part] * (round(done / widest * bar_width) - len(bar)), SHADES[part])
        bar.append(" " * (bar_width - len(bar)))
        style = "bold" if name == chosen else ""
        line = Text(f"{'▶' if name == chosen else ' '} {name}".ljust(name_width), style)
        line.append_text(Text.assemble(bar[:edge], (EDGE, "bold"), bar[edge + 1 :]))
        sign = "" if memory.peak <= device.bytes else " ✗"
        lines.append(line.append(f" {gib(memory.peak)}{sign}", style))
    return lines


def numbers(memories: Mapping[str, Memory], chosen: str, width: int) -> Sequence[Text]:
    """The legend with the size of each part, one column per method; the last row is the peak."""
    column = min(10, (width - 14) // len(memories) - 1)
    widths = [-13, *([column] * len(memories))]
    titles = ["GiB at peak", *(f"▶{name}" if name == chosen else name for name in memories)]
    lines = [Text(cells(titles, widths), "bold")]
    for part in PARTS:
        sizes = [memory.parts()[part] for memory in memories.values()]
        if any(sizes):
            row = cells([part, *(gib(size).replace(" ", "") for size in sizes)], [-11, *widths[1:]])
            lines.append(Text.assemble((SIGNS[part], SHADES[part]), f" {row}"))
    peaks = [gib(memory.peak).replace(" ", "") for memory in memories.values()]
    return [*lines, Text(cells(["peak", *peaks], widths), "bold")]


class Parameters(Lines):
    """A line per kind of projection, and the document's count."""


def parameters(result: Result, width: int) -> Sequence[Text]:
    model, method = result.model, result.method
    rows = list(map(cells_of, projections(model, method)))
    widths = [max(map(len, column)) for column in zip(PROJECTION, *rows, strict=True)]
    widths[0] = -widths[0]  # names are left-aligned
    if not rows:
        lines = [Text(" · ".join(f"{name} {count:,}" for name, count in model.components().items()))]
    elif sum(map(abs, widths)) + 5 <= width:
        lines = [Text(cells(PROJECTION, widths), "bold"), *(Text(cells(row, widths)) for row in rows)]
    else:  # two lines each
        lines = [Text("projection  in → out, count, parameters; A and B", "bold")]
        for name, shape, a, b, count, total in rows:
            lines += [Text(f"{name}  {shape}  × {count} = {total}"), Text(f"    A {a}, B {b}", "dim")]
    simplified = method.document_count(model)
    if simplified is None:
        lines.append(Text("the document's rule (§3) does not apply to this method", "dim"))
    else:
        counts = f"{simplified:,} · exact {result.trainable:,}"
        lines.append(Text.assemble(("document (§3) ", "bold"), counts))
        lines.append(Text(why_they_differ(model, method) or "they agree", "dim"))
    published = [f"published as {model.published} parameters"] if model.published else []
    return [*lines, *(Text(f"note: {note}", "dim") for note in (*published, *model.notes, *method.notes(model)))]


class Pinned(Lines):
    """Pinned configurations side by side, compared with the current one."""

    def compare(self, pins: Sequence[Result], now: Result | None) -> None:
        self.display = bool(pins)
        if pins:
            self.show(lambda width: pinned(pins, now, width))


def pinned(pins: Sequence[Result], now: Result | None, width: int) -> Sequence[Text]:
    """A column per pinned configuration; `±` is the difference to the current one."""
    widths = [-11, *([(width - 12) // 2] * len(pins))]
    lines = [Text(f"{MARKS[number]} {pin.title}", "bold") for number, pin in enumerate(pins)]

    def row(name: str, values: Sequence[str], style: str = "") -> None:
        lines.append(Text(cells([name, *values], widths), style))

    row("pinned", list(MARKS[: len(pins)]), "bold")
    row("trainable", [f"{pin.trainable:,}" for pin in pins])
    if now is not None:
        row("  ± now", [f"{pin.trainable - now.trainable:+,}" for pin in pins], "dim")
    row("peak", [in_units(pin.memory.peak) for pin in pins], "bold")
    if now is not None:
        more = [pin.memory.peak - now.memory.peak for pin in pins]
        row("  ± now", [f"{'−' if size < 0 else '+'}{in_units(abs(size))}" if size else "0" for size in more], "dim")
    row("fits", ["✓ yes" if pin.spare >= 0 else "✗ no" for pin in pins])
    row("on", [pin.device.label for pin in pins], "dim")
    for part in (part for part in pins[0].memory.parts() if any(pin.memory.parts()[part] for pin in pins)):
        row(part, [gib(pin.memory.parts()[part]) for pin in pins])
    return lines
