"""The calculator's result: verdict, memory bars, parameter counts, pinned configurations; the dialogs about it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from pipeline.calc.fit import LARGEST, Gpu, Largest
from pipeline.calc.memory import PARTS, Memory
from pipeline.calc.method import projections, why_they_differ
from pipeline.calc.report import PROJECTION, SHADES, capped, cells_of, explain, gib, smallest
from pipeline.project.logs.run_log import in_units
from pipeline.workbench import calculated_claims
from tui.dialogs import Reader
from tui.screens.calculator.query import Result
from tui.widgets.form import format_value
from tui.widgets.text import cells

SIGNS = dict(zip(PARTS, "█◆▓▒░≡·", strict=True))  # parts differ in symbol too, not only in colour
EDGE = "│"  # where the GPU ends
MARKS = "①②"  # of pinned configurations
COLORS = {"holds": "green", "differs": "bold red", "depends": "yellow"}  # of the document's claims


class Advice(NamedTuple):
    """The results of the slow search: the largest values that fit, and changes that make it fit: (text, peak)."""

    largest: Largest
    changes: Sequence[tuple[str, int]]


def verdict(result: Result, advice: Advice | None, width: int) -> Sequence[Text]:
    """Trainable parameters, peak, whether it fits, and advice, for which the search may still run."""
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
        most = advice.largest._asdict()
        largest = [f"{key} {capped(value, LARGEST.get(key))}" for key, value in most.items() if value]
        return Text(f"the most that fits: {' · '.join(largest)}")
    if not advice.changes:
        return Text("no setting makes it fit; a larger device is needed: " + smallest(result.memory.peak))
    change, peak = advice.changes[-1]
    needed = "" if peak <= result.device.bytes else f"; still too much: {smallest(peak)} is needed"
    return Text(f"change this: {change.replace('--', '')} → {in_units(peak)}{needed}")


def memory(result: Result, width: int) -> Sequence[Text]:
    """Memory of several methods: bars against the size of a GPU, and a table of the parts."""
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


def parameters(result: Result, width: int) -> Sequence[Text]:
    """A line per kind of projection, and the document's count."""
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


def pinned(pins: Sequence[Result], now: Result, width: int) -> Sequence[Text]:
    """A column per pinned configuration; `±` is the difference to the current one."""
    widths = [-11, *([(width - 12) // 2] * len(pins))]
    lines = [Text(f"{MARKS[number]} {pin.title}", "bold") for number, pin in enumerate(pins)]

    def row(name: str, values: Sequence[str], style: str = "") -> None:
        lines.append(Text(cells([name, *values], widths), style))

    row("pinned", list(MARKS[: len(pins)]), "bold")
    row("trainable", [f"{pin.trainable:,}" for pin in pins])
    row("  ± now", [f"{pin.trainable - now.trainable:+,}" for pin in pins], "dim")
    row("peak", [in_units(pin.memory.peak) for pin in pins], "bold")
    more = [pin.memory.peak - now.memory.peak for pin in pins]
    row("  ± now", [f"{'−' if size < 0 else '+'}{in_units(abs(size))}" if size else "0" for size in more], "dim")
    row("fits", ["✓ yes" if pin.spare >= 0 else "✗ no" for pin in pins])
    row("on", [pin.device.label for pin in pins], "dim")
    for part in (part for part in pins[0].memory.parts() if any(pin.memory.parts()[part] for pin in pins)):
        row(part, [gib(pin.memory.parts()[part]) for pin in pins])
    return lines


class Explanation(Reader):
    """What `d` or `e` opens."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("d,e", "dismiss", "Close")]


def document_table() -> Explanation:
    """The document's claims about numbers of the calculator: its value, the exact one, and why they differ."""
    summary, claims = calculated_claims()
    rows = Table("", "claim", "document", "exact", "", box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for row in claims:
        shown, mark = row["shown"], Text(row["mark"], COLORS[row["verdict"]])
        rows.add_row(row["title"], Text(row["quote"]), Text(shown["says"]), Text(shown["measured"]), mark)
        if row["verdict"] != "holds":
            rows.add_row("", Text(row["why"], "dim italic"))
    return Explanation(Text(f"{summary}. `lora claims` has all of the document's.\n", "bold"), rows)


def formulas(result: Result) -> Explanation:
    """The formula of each number with the values inserted."""
    rows = Table.grid(padding=(0, 2))
    for what, formula in explain(result.model, result.method, result.run, result.memory):
        rows.add_row(Text(what, "bold"), Text(formula))
    return Explanation(Text(f"{result.title}\n", "bold"), rows)


class Confirm(ModalScreen[bool]):
    """Shows each change as `key: old → new`. Enter writes them, Escape cancels."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "dismiss(True)", "Write"),
        Binding("escape,q,n", "dismiss(False)", "Leave it"),
    ]

    def __init__(self, file: str, changes: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__()
        self._file, self._changes = file, changes

    def compose(self) -> ComposeResult:
        lines = [f"{key}: {_format_value(old)} → {_format_value(new)}" for key, (old, new) in self._changes.items()]
        with VerticalScroll(classes="dialog"):
            yield Static(Text(f"Write to {self._file}:\n", "bold"))
            yield Static(Text("\n".join(lines)), id="changes")
            yield Static(Text("\nEnter writes, Escape leaves it as it is.", "dim"))


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(value)}]" if isinstance(value, list) else format_value(value)
