"""The calculator's result as lines: verdict, memory by method, parameters and formulas, pinned
configurations.

Bars tell the parts of memory apart by texture, always in the same order; colour says only whether a
part is there for the whole step or during it.
"""

from collections.abc import Callable, Mapping, Sequence

from textual.content import Content

from pipeline.calc.fit import Gpu
from pipeline.calc.memory import PARTS, Memory
from pipeline.calc.method import projections, why_they_differ
from pipeline.calc.report import PROJECTION, cells_of, explain
from pipeline.files.text import in_units
from tui.screens.calculator.query import Result
from tui.widgets.colors import share_style
from tui.widgets.drawing import Lines
from tui.widgets.text import bar, cells
from tui.widgets.units import format_count_change, percent, unit_of

TEXTURES = dict(zip(PARTS, "█◆▓▒░≡·", strict=True))
KEPT_PARTS = ("weights", "adapter", "optimizer")  # there from the first phase of a step to the last
EDGE = "│"  # where the GPU ends
CUT = "»"  # a bar that goes on
FAR = 20  # times the longest bar: a GPU that is larger lies beyond the chart
MARKS = "①②"  # of pinned configurations
BADGE = 18  # cells of the large verdict
MUTED = "$foreground 65%"


def verdict(result: Result, rows: int, width: int) -> Lines:
    """Whether it fits, large; used of total as a bar; what is free. `rows`: of the badge, 3 where
    there is room.
    """
    fits, peak, total = result.spare >= 0, result.memory.peak, result.device.bytes
    unit = unit_of([peak, total])
    words = "✓ FITS" if fits else "✗ DOES NOT FIT"
    colors = "$text-success on $success-muted" if fits else "$text-error on $error-muted"
    spare = f"{unit.format(abs(result.spare))} {unit} {'free' if fits else 'too much'}"
    # a tiny model on a large GPU
    shown = unit.format(peak) if peak > 0.01 * unit.bytes else in_units(peak)
    used = Content.assemble((shown, "bold"), f" of {unit.format(total)} {unit}")
    beside = width - BADGE - 2 if rows > 1 else width
    sizes = Content.assemble(
        used, " " * max(beside - used.cell_length - len(spare), 2), (spare, "bold")
    )
    whole = usage_bar(peak, total, beside)
    if rows == 1:
        lines = [Content.styled(words.center(width), f"bold {colors}"), whole, sizes]
    else:
        badge = [Content.styled(text.center(BADGE), f"bold {colors}") for text in ("", words, "")]
        lines = [
            Content.assemble(left, "  ", right)
            for left, right in zip(badge, (whole, whole, sizes), strict=True)
        ]
    share, where = (
        f"{result.trainable:,} trainable, {percent(result.share)}",
        f"peak in {result.memory.where}",
    )
    if len(share) + len(where) + 3 <= width:
        return [*lines, Content.assemble(share, (f" · {where}", MUTED))]
    return [*lines, Content(share), Content.styled(where, MUTED)]


def usage_bar(used: int, total: int, width: int) -> Content:
    """The share that is used, coloured by it; what is too much follows the GPU's end in another
    texture.
    """
    if used <= total:
        filled = bar(used / total, width)
        return Content.styled(filled.rstrip(), share_style(used / total)) + Content.styled(
            "░" * (width - len(filled.rstrip())), "$foreground 20%"
        )
    edge = min(max(round(total / used * width), 1), width - 2)
    return Content.assemble(
        ("█" * edge, "$error"), (EDGE, "bold"), ("▒" * (width - edge - 1), "$error")
    )


def memory(result: Result, look: Callable[[str], tuple[str, str]], rows: int, width: int) -> Lines:
    """Memory of several methods: bars against the size of a GPU, and a table of the parts.

    `look`: a method's sign and style. `rows`: height of a bar.
    """
    memories = {name: memory for name, (_, _, memory) in result.columns.items()}
    signs = {name: look(method.name) for name, (method, _, _) in result.columns.items()}
    return [
        *bars(memories, signs, result.chosen, result.device, rows, width),
        Content(),
        *numbers(memories, result.chosen, width),
    ]


def bars(
    memories: Mapping[str, Memory],
    signs: Mapping[str, tuple[str, str]],
    chosen: str,
    device: Gpu,
    rows: int,
    width: int,
) -> Lines:
    """A bar per method; the first line marks the size of the device."""
    name_width = max(map(len, memories)) + 5
    peaks = [memory.peak for memory in memories.values()]
    # the bars of a tiny model would be dots: the GPU's end is not in them
    is_far = device.bytes > FAR * max(peaks)
    total = 0 if is_far else device.bytes
    unit = unit_of([total, *peaks])
    sizes = {name: unit.format(memory.peak) for name, memory in memories.items()}
    size_width = max(map(len, sizes.values()))
    bar_width = max(10, width - name_width - size_width - 3)
    # A bar that is much longer than the rest would shrink what the question is about.
    widest = min(max(total, *peaks), 2 * max(total, memories[chosen].peak))
    edge = -1 if is_far else min(bar_width - 1, round(total / widest * bar_width))
    label, before = f"{device.label}, {unit.format(device.bytes)}", name_width + edge
    if is_far:
        head = f"{device.label}, {in_units(device.bytes)} ▶".rjust(name_width + bar_width)
    else:
        head = (
            f"{label} ▼".rjust(before + 1)
            if len(label) + 1 < before
            else f"{' ' * before}▼ {label}"
        )
    lines = [Content.styled(head, "bold")]
    for name, memory in memories.items():
        drawn = _stacked(memory, widest, bar_width, edge)
        is_chosen, (sign, style) = name == chosen, signs[name]
        title = Content.assemble(
            "▶ " if is_chosen else "  ", (sign, style), (f" {name}", "bold" if is_chosen else "")
        ).pad_right(name_width - len(name) - 4)
        size = f" {sizes[name].rjust(size_width)}{'' if memory.peak <= device.bytes else ' ✗'}"
        lines.append(title + drawn + Content.styled(size, "bold" if is_chosen else ""))
        lines += [Content(" " * name_width) + drawn] * (rows - 1)
        lines += [Content()] * (rows > 1)
    return lines


def _stacked(memory: Memory, widest: int, width: int, edge: int) -> Content:
    """The parts one after the other, with the GPU's end; none if `edge` is negative."""
    # Each part ends at the rounded sum of the parts so far, so that rounding does not add up.
    drawn, done = Content(), 0
    for part, size in memory.parts().items():
        done += size
        drawn += Content.styled(
            TEXTURES[part] * (round(done / widest * width) - len(drawn)), part_style(part)
        )
    drawn = (
        Content.assemble(drawn[: width - 1], (CUT, "bold"))
        if done > widest
        else drawn.pad_right(width - len(drawn))
    )
    return drawn if edge < 0 else drawn[:edge] + Content.styled(EDGE, "bold") + drawn[edge + 1 :]


def part_style(part: str) -> str:
    if part in KEPT_PARTS:
        return "$primary"
    return "$foreground 60%" if part == "overhead" else "$secondary"


def numbers(memories: Mapping[str, Memory], chosen: str, width: int) -> Lines:
    """The legend with the size of each part, a column per method; of those beside the chosen one,
    as many as fit.
    """
    unit, names = unit_of(memory.peak for memory in memories.values()), list(memories)
    count = min(max((width - 13) // 9, 1), len(names))
    first = min(max(names.index(chosen) - count // 2, 0), len(names) - count)
    shown = {name: memories[name] for name in names[first : first + count]}
    widths = [-13, *([min(12, (width - 13) // count - 1)] * count)]
    titles = [f"{unit} at peak", *(f"▶{name}" if name == chosen else name for name in shown)]
    lines = [Content.styled(cells(titles, widths), "bold")]
    for part in PARTS:
        if any(memory.parts()[part] for memory in memories.values()):
            row = cells(
                [part, *(unit.format(memory.parts()[part]) for memory in shown.values())],
                [-11, *widths[1:]],
            )
            lines.append(Content.assemble((TEXTURES[part], part_style(part)), f" {row}"))
    return lines


def details(result: Result, width: int) -> Lines:
    """Parameters by kind of projection, the rule of thumb's count, notes, and the formula of each
    number.
    """
    model, method = result.model, result.method
    rows = list(map(cells_of, projections(model, method)))
    widths = [max(map(len, column)) for column in zip(PROJECTION, *rows, strict=True)]
    widths[0] = -widths[0]  # names are left-aligned
    if not rows:
        lines = [
            Content(" · ".join(f"{name} {count:,}" for name, count in model.components().items()))
        ]
    elif sum(map(abs, widths)) + 5 <= width:
        lines = [
            Content.styled(cells(PROJECTION, widths), "bold"),
            *(Content(cells(row, widths)) for row in rows),
        ]
    else:  # two lines each
        lines = [Content.styled("projection  in → out, count, parameters; A and B", "bold")]
        for name, shape, a, b, count, total in rows:
            lines += [
                Content(f"{name}  {shape}  × {count} = {total}"),
                Content.styled(f"    A {a}, B {b}", MUTED),
            ]
    simplified = method.simple_count(model)
    if simplified is None:
        lines.append(Content.styled("the rule of thumb 2·r·d does not apply to this method", MUTED))
    else:
        counts = f"{simplified:,} · exact {result.trainable:,}"
        lines.append(Content.assemble(("rule of thumb ", "bold"), counts))
        lines.append(Content.styled(why_they_differ(model, method) or "they agree", MUTED))
    published = [f"published as {model.published} parameters"] if model.published else []
    lines += [
        Content.styled(f"note: {note}", MUTED)
        for note in (*published, *model.notes, *method.notes(model))
    ]
    lines += [Content(), Content.styled("Each number, with its values", "bold")]
    for what, formula in explain(model, method, result.run, result.memory):
        lines += [Content.assemble((f"{what}  ", "bold"), formula)]
    return lines


def pinned(pins: Sequence[Result], now: Result, width: int) -> Lines:
    """A column per pinned configuration; `±` is the difference to the current one."""
    widths = [-11, *([min((width - 11) // len(pins) - 1, 18)] * len(pins))]
    unit = unit_of(each.memory.peak for each in (*pins, now))
    lines = [
        Content.styled(f"{MARKS[number]} {pin.title}", "bold") for number, pin in enumerate(pins)
    ]

    def row(name: str, values: Sequence[str], style: str = "") -> None:
        lines.append(Content.styled(cells([name, *values], widths), style))

    row("pinned", list(MARKS[: len(pins)]), "bold")
    row("trainable", [f"{pin.trainable:,}" for pin in pins])
    row("  ± now", [format_count_change(pin.trainable - now.trainable) for pin in pins], MUTED)
    row(f"peak, {unit}", [unit.format(pin.memory.peak) for pin in pins], "bold")
    row("  ± now", [unit.format_change(pin.memory.peak - now.memory.peak) for pin in pins], MUTED)
    row("fits", ["✓ yes" if pin.spare >= 0 else "✗ no" for pin in pins])
    row("on", [pin.device.label for pin in pins], MUTED)
    for part in (part for part in PARTS if any(pin.memory.parts()[part] for pin in pins)):
        row(part, [unit.format(pin.memory.parts()[part]) for pin in pins])
    return lines
