"""The calculator's result: verdict, parameter counts, and the document's count beside the exact one."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from pipeline.calc.fit import LARGEST, Largest
from pipeline.calc.parameters import document_count, notes, projections, why_they_differ
from pipeline.calc.report import PROJECTION, capped, cells_of, gib, smallest, title_of
from pipeline.project.logs.run_log import in_units
from tui.screens.calculator.model import Result
from tui.widgets.text import Lines, cells


class Advice(NamedTuple):
    """The results of the slow search: the largest values that fit, and changes that make it fit: (text, peak)."""

    largest: Largest
    changes: Sequence[tuple[str, int]]


class Verdict(Lines):
    """Trainable parameters, peak, whether it fits, and advice (None while it is being searched for)."""

    def show_result(self, result: Result, advice: Advice | None) -> None:
        self.show(lambda width: verdict(result, advice, width))


def verdict(result: Result, advice: Advice | None, width: int) -> Sequence[Text]:
    peak, run = result.memory, result.run
    fits = result.spare >= 0
    text = f"✓ fits: {in_units(result.spare)} free" if fits else f"✗ does not fit: {in_units(-result.spare)} too much"
    return [
        Text.assemble((result.model.name, "bold"), f"  {result.model.total:,} parameters"),
        Text.assemble((title_of(result.method), "bold"), f"  {run.precision}, {run.batch} × {run.sequence:,}"),
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


class Parameters(Lines):
    """A line per kind of projection, and the document's count."""

    def show_result(self, result: Result) -> None:
        self.show(lambda width: [*_table(result, width), *_document(result), *_notes(result)])


def _table(result: Result, width: int) -> Sequence[Text]:
    adapted = projections(result.model, result.method) if result.method.kind == "lora" else ()
    if not adapted:
        return [Text(" · ".join(f"{name} {count:,}" for name, count in result.model.components().items()))]
    rows = list(map(cells_of, adapted))
    widths = [max(map(len, column)) for column in zip(PROJECTION, *rows, strict=True)]
    widths[0] = -widths[0]
    if sum(map(abs, widths)) + 5 <= width:
        return [Text(cells(PROJECTION, widths), "bold"), *(Text(cells(row, widths)) for row in rows)]
    lines = [Text("projection  in → out, count, parameters; A and B", "bold")]
    for name, shape, a, b, count, parameters in rows:
        lines += [Text(f"{name}  {shape}  × {count} = {parameters}"), Text(f"    A {a}, B {b}", "dim")]
    return lines


def _document(result: Result) -> Sequence[Text]:
    simplified = document_count(result.model, result.method)
    if simplified is None:
        return [Text("the document's rule (§3) does not apply to this method", "dim")]
    reason = why_they_differ(result.model, result.method) or "they agree"
    return [
        Text.assemble(("document (§3) ", "bold"), f"{simplified:,} · exact {result.trainable:,}"),
        Text(reason, "dim"),
    ]


def _notes(result: Result) -> Sequence[Text]:
    published = [f"published as {result.model.published} parameters"] if result.model.published else []
    lines = (*published, *result.model.notes, *notes(result.model, result.method))
    return [Text(f"note: {note}", "dim") for note in lines]


class Pinned(Lines):
    """Pinned configurations side by side, compared with the current one."""

    def compare(self, pins: Sequence[Result], now: Result | None) -> None:
        self.display = bool(pins)
        if pins:
            self.show(lambda width: pinned(pins, now, width))


MARKS = "①②"


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
        row("  ± now", [_format_difference(pin.memory.peak - now.memory.peak) for pin in pins], "dim")
    row("fits", ["✓ yes" if pin.spare >= 0 else "✗ no" for pin in pins])
    row("on", [pin.device.label for pin in pins], "dim")
    for part in (part for part in pins[0].memory.parts() if any(pin.memory.parts()[part] for pin in pins)):
        row(part, [gib(pin.memory.parts()[part]) for pin in pins])
    return lines


def _format_difference(size: int) -> str:
    return f"{'−' if size < 0 else '+'}{in_units(abs(size))}" if size else "0"
