"""What the calculator answers: the verdict, the parameters, and the document's number beside the exact one."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from pipeline.calc.fit import LARGEST, Largest
from pipeline.calc.parameters import document_count, notes, projections, why_they_differ
from pipeline.calc.report import PROJECTION, capped, cells_of, gib, smallest, title_of
from pipeline.project.logs.run_log import in_units
from tui.screens.calculator.model import Result
from tui.widgets.text_block import Lines, cells


class Advice(NamedTuple):
    """What takes longer to find: the most that fits, or what to change where it does not: (words, peak)."""

    most: Largest
    changes: Sequence[tuple[str, int]]


class Verdict(Lines):
    """Trainable, peak, fits or not, and what next; `advice` is None while it is being looked for."""

    def tell(self, result: Result, advice: Advice | None) -> None:
        self.show(lambda width: verdict(result, advice, width))


def verdict(result: Result, advice: Advice | None, width: int) -> Sequence[Text]:
    peak, run = result.memory, result.run
    fits = result.spare >= 0
    said = f"✓ fits: {in_units(result.spare)} free" if fits else f"✗ does not fit: {in_units(-result.spare)} too much"
    return [
        Text.assemble((result.model.name, "bold"), f"  {result.model.total:,} parameters"),
        Text.assemble((title_of(result.method), "bold"), f"  {run.precision}, {run.batch} × {run.sequence:,}"),
        Text.assemble((f"{result.trainable:,} trainable", "bold"), f", {result.percent:.4g}%"),
        Text.assemble((f"peak {in_units(peak.peak)}", "bold"), f"  in {peak.where}"),
        Text.assemble((said, "bold green" if fits else "bold red"), f"  on {result.device.label}"),
        _next(result, advice),
        *([Text()] if advice is None and width < 72 else []),  # what is found takes two lines: nothing jumps
    ]


def _next(result: Result, advice: Advice | None) -> Text:
    """What else fits, or what to change."""
    if advice is None:
        return Text("looking for the most that fits …" if result.spare >= 0 else "looking for what to change …", "dim")
    if result.spare >= 0:
        found = [f"{key} {capped(value, LARGEST.get(key))}" for key, value in vars(advice.most).items() if value]
        return Text(f"the most that fits: {' · '.join(found)}")
    if not advice.changes:
        return Text("nothing to change is left; a larger device is needed: " + smallest(result.memory.peak))
    words, peak = advice.changes[-1]
    needed = "" if peak <= result.device.bytes else f"; still too much: {smallest(peak)} is needed"
    return Text(f"change this: {words.replace('--', '')} → {in_units(peak)}{needed}")


class Parameters(Lines):
    """A line each kind of projection, and what the document counts."""

    def tell(self, result: Result) -> None:
        self.show(lambda width: [*_table(result, width), *_document(result), *_notes(result)])


def _table(result: Result, width: int) -> Sequence[Text]:
    found = projections(result.model, result.method) if result.method.kind == "lora" else ()
    if not found:
        return [Text(" · ".join(f"{name} {count:,}" for name, count in result.model.components().items()))]
    rows = list(map(cells_of, found))
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
    why = why_they_differ(result.model, result.method) or "they agree"
    return [Text.assemble(("document (§3) ", "bold"), f"{simplified:,} · exact {result.trainable:,}"), Text(why, "dim")]


def _notes(result: Result) -> Sequence[Text]:
    published = [f"published as {result.model.published} parameters"] if result.model.published else []
    said = (*published, *result.model.notes, *notes(result.model, result.method))
    return [Text(f"note: {note}", "dim") for note in said]


class Pinned(Lines):
    """Two configurations that were kept, side by side, each beside the one of now."""

    def compare(self, pins: Sequence[Result], now: Result | None) -> None:
        self.display = bool(pins)
        if pins:
            self.show(lambda width: pinned(pins, now, width))


MARKS = "①②"


def pinned(pins: Sequence[Result], now: Result | None, width: int) -> Sequence[Text]:
    """A column each; `±` is how much more or less it is than now."""
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
        row("  ± now", [_signed(pin.memory.peak - now.memory.peak) for pin in pins], "dim")
    row("fits", ["✓ yes" if pin.spare >= 0 else "✗ no" for pin in pins])
    row("on", [pin.device.label for pin in pins], "dim")
    for part in (part for part in pins[0].memory.parts() if any(pin.memory.parts()[part] for pin in pins)):
        row(part, [gib(pin.memory.parts()[part]) for pin in pins])
    return lines


def _signed(size: int) -> str:
    return f"{'−' if size < 0 else '+'}{in_units(abs(size))}" if size else "0"
