"""The calculator's result as lines: whether it fits, what else fits, memory by method, formulas.

Bars tell the parts of memory apart by texture, always in the same order; colour says only whether a
part is there for the whole step or during it.
"""

import textwrap
from collections.abc import Iterator, Sequence

from textual.content import Content

from pipeline.calc.fit import LARGEST, PRECISIONS_BY_QUALITY, gpus
from pipeline.calc.memory import PARTS, Memory
from pipeline.calc.method import projections, why_they_differ
from pipeline.calc.report import PROJECTION, capped, cells_of, explain
from pipeline.files.text import in_units
from pipeline.views.calculation import SWEPT, Advice, Result
from tui.panes.lines import MUTED
from tui.panes.table import fitted
from tui.widgets.cells import bar, method_sign
from tui.widgets.colors import share_style
from tui.widgets.units import format_count_change, percent, unit_of

TEXTURES = dict(zip(PARTS, "█◆▓▒░≡·", strict=True))
WHOLE_STEP = ("weights", "adapter", "optimizer")  # there from the first phase of a step to the last
EDGE = "│"  # where the GPU ends
CUT = "»"  # a bar that goes on
FAR = 20  # times the longest bar: a GPU that is larger lies beyond the chart
MARKS = "①②"  # of pinned configurations
BADGE = 18  # cells of the large verdict
LARGE = 64  # cells of a pane with room for it
CELL = 7  # of a number in a table
BAD, GOOD = "$text-error", "$text-success"
NONE = Content.styled("✗ none", BAD)  # of a setting that fits with no value


def grid(rows: Sequence[Sequence[Content | str]], least: int = 0) -> list[Content]:
    """Rows in columns of `least` cells or more, the first to the left and the others to the right."""
    columns = [[Content.empty() + cell for cell in column] for column in zip(*rows, strict=True)]
    lines = [Content()] * len(rows)
    for number, column in enumerate(columns):
        width = max(least, *(cell.cell_length for cell in column))
        for row, cell in enumerate(column):
            lines[row] += fitted(cell, width, right=number > 0) + " "
    return [line.rstrip() for line in lines]


def _muted(text: str) -> Content:
    return Content.styled(text, MUTED)


def _bold(text: str) -> Content:
    return Content.styled(text, "bold")


def verdict(result: Result, width: int) -> Iterator[Content]:
    """Whether it fits, large where there is room; used of total as a bar; what is free."""
    fits, peak, total = result.spare >= 0, result.memory.peak, result.device.bytes
    unit = unit_of([peak, total])
    words = "✓ FITS" if fits else "✗ DOES NOT FIT"
    style = f"{GOOD} on $success-muted" if fits else f"{BAD} on $error-muted"
    # a tiny model on a large GPU
    shown = unit.format(peak) if peak > 0.01 * unit.bytes else in_units(peak)
    used = Content.assemble((shown, "bold"), f" of {unit.format(total)} {unit}")
    spare = f"{unit.format(abs(result.spare))} {unit} {'free' if fits else 'too much'}"
    is_large = width >= LARGE
    room = width - BADGE - 2 if is_large else width
    sizes = used.pad_right(max(room - used.cell_length - len(spare), 2)) + _bold(spare)
    drawn = usage_bar(peak, total, room)
    if is_large:
        for text, line in (("", drawn), (words, drawn), ("", sizes)):
            yield Content.assemble((text.center(BADGE), f"bold {style}"), "  ", line)
    else:
        yield from (Content.styled(words.center(width), f"bold {style}"), drawn, sizes)
    share = f"{result.trainable:,} trainable, {percent(result.share)}"
    where = f"peak in {result.memory.where}"
    if len(share) + len(where) + 3 <= width:
        yield Content.assemble(share, (f" · {where}", MUTED))
    else:
        yield from (Content(share), _muted(where))


def usage_bar(used: int, total: int, width: int) -> Content:
    """The share that is used, coloured by it; what is too much follows the GPU's end in another
    texture.
    """
    if used <= total:
        filled = bar(used / total, width).rstrip()
        rest = "░" * (width - len(filled))
        return Content.assemble((filled, share_style(used / total)), (rest, "$foreground 20%"))
    edge = min(max(round(total / used * width), 1), width - 2)
    rest = "▒" * (width - edge - 1)
    return Content.assemble(("█" * edge, "$error"), (EDGE, "bold"), (rest, "$error"))


# Answers


def answers(result: Result, advice: Advice | None, width: int) -> Iterator[Content]:
    """The largest batch, sequence and rank, each alone; what to change; other values; GPUs.

    Without advice, for which the search still runs, its lines are kept free.
    """
    title, found = _muted("largest, one at a time"), _muted("…")
    if advice:
        sizes = advice.largest._asdict() | {"precision": None}
        parts = [_largest(key, size) for key, size in sizes.items() if size is not None]
        found = Content.styled(f" {EDGE} ", "$foreground 40%").join(parts)
    # decided by what a line may need, so that the search changes no height
    yield from [Content.assemble(title, "  ", found)] if width >= 66 else [title, found]
    yield _smaller_gpu(result, width)
    yield _advice(result, advice)
    for key in SWEPT:
        yield from _sweep(result, key, advice, width)
    for sign, style, holds in (("✓", GOOD, True), ("✗", BAD, False)):
        cards = [gpu for gpu in gpus().values() if (gpu.bytes >= result.memory.peak) == holds]
        # a label is not broken
        labels = [gpu.label.replace(" ", "\N{NO-BREAK SPACE}") for gpu in cards]
        lines = textwrap.wrap("\N{NO-BREAK SPACE}· ".join(labels), max(width - 2, 12))
        for line, before in zip(lines, [sign, *" " * len(lines)], strict=False):
            yield Content.assemble((before, f"bold {style}"), f" {line}")


def _largest(key: str, value: int) -> Content:
    size = _bold(capped(value, LARGEST[key])) if value else NONE
    return Content.assemble(f"{key} ", size)


def _advice(result: Result, advice: Advice | None) -> Content:
    """What makes it fit; or the least quantized base that fits as well, if it is a better one."""
    if result.spare < 0:
        found = Content("no setting does")
        if advice is None:
            found = _muted("…")
        elif advice.changes:
            change, peak = advice.changes[-1]
            enough = "" if peak <= result.device.bytes else ", still too much"
            words = f" → {in_units(peak)}{enough}"
            found = Content.assemble((change.replace("--", ""), "bold"), words)
        return _muted("to make it fit  ") + found
    better, ranking = advice and advice.largest.precision, PRECISIONS_BY_QUALITY
    now = result.run.precision
    if better and (now not in ranking or ranking.index(better) < ranking.index(now)):
        label = _muted("a better base fits too  ")
        return Content.assemble(label, "precision ", (better, "bold"))
    return Content()


def _smaller_gpu(result: Result, width: int) -> Content:
    """The smallest NVIDIA GPU that holds the peak; if the chosen one does, the smallest of those
    that are smaller.
    """
    fits = result.spare >= 0
    most = result.device.bytes if fits else float("inf")
    cards = [gpu for name, gpu in gpus().items() if not name.startswith("mac-")]
    cards = [gpu for gpu in cards if result.memory.peak <= gpu.bytes < most]
    name = f"{cards[0].label}, {in_units(cards[0].bytes)}" if cards else "none of these"
    title = f"{'smaller' if fits else 'smallest'} GPU{' that holds it' * (width >= 60)}"
    return Content.assemble((f"{title}  ", MUTED), (name, "bold"))


def _sweep(result: Result, key: str, advice: Advice | None, width: int) -> list[Content]:
    """Two lines: the values of a setting, and the peak with each."""
    values, now = result.values(key), result.value(key)
    if not values:
        return []
    peaks = advice.sweeps[key] if advice else {}
    unit = unit_of([peak for peak in peaks.values() if peak] or [result.memory.peak])
    first, second = [_bold(key)], [_muted(str(unit))]
    for value in around(values, now, (width - 8) // (CELL + 1)):
        peak, here = peaks.get(value), value == now
        text = "–" if advice else "…"
        if peak is not None:
            text = unit.format(peak)
        fits = peak is None or peak <= result.device.bytes
        weight = "bold" * here
        first.append(Content.styled(f"{'▶' * here}{value:,} ", f"{weight} {'$accent' * here}"))
        second.append(
            Content.styled(f"{text}{' ' if fits else '✗'}", weight if fits else f"{weight} {BAD}")
        )
    return grid([first, second], CELL)


def around(values: Sequence[int], now: int, count: int) -> Sequence[int]:
    """At most `count` neighbours, at least one, `now` among them."""
    count = max(count, 1)
    start = min(max(values.index(now) - count // 2, 0), max(len(values) - count, 0))
    return values[start : start + count]


# Memory by method


def memory(result: Result, width: int) -> Iterator[Content]:
    """Bars of memory against the size of the GPU, which the first line marks; a table of the
    parts.
    """
    device, memories = result.device, {name: m for name, (_, _, m) in result.columns.items()}
    peaks = [memory.peak for memory in memories.values()]
    # the bars of a tiny model would be dots: the GPU's end is not in them
    is_far = device.bytes > FAR * max(peaks)
    total = 0 if is_far else device.bytes
    unit = unit_of([total, *peaks])
    left = max(map(len, memories)) + 5
    longest = max(len(unit.format(peak)) for peak in peaks)
    room = max(10, width - left - longest - 3)
    # A bar that is much longer than the rest would shrink what the question is about.
    widest = min(max(total, *peaks), 2 * max(total, result.memory.peak))
    edge = -1 if is_far else min(room - 1, round(total / widest * room))
    label = f"{device.label}, {unit.format(device.bytes)}"
    head = f"{label} ▼".rjust(left + edge + 1)
    if is_far:
        head = f"{device.label}, {in_units(device.bytes)} ▶".rjust(left + room)
    elif len(label) + 1 >= left + edge:
        head = f"{' ' * (left + edge)}▼ {label}"
    yield _bold(head)
    for name, (method, _, sizes) in result.columns.items():
        here, (sign, style) = name == result.chosen, method_sign(method.name)
        weight = "bold" * here
        yield Content.assemble(
            "▶ " if here else "  ",
            (sign, style),
            (f" {name:{left - 4}}", weight),
            _stacked(sizes, widest, room, edge),
            (f" {unit.format(sizes.peak):>{longest}}", weight),
            (" ✗" * (sizes.peak > device.bytes), weight),
        )
    yield Content()
    yield from parts(memories, result.chosen, width)


def _stacked(memory: Memory, widest: int, width: int, edge: int) -> Content:
    """The parts one after the other, with the GPU's end; none if `edge` is negative."""
    # Each part ends at the rounded sum of the parts so far, so that rounding does not add up.
    drawn, done = Content(), 0
    for part, size in memory.parts().items():
        done += size
        cells = round(done / widest * width) - len(drawn)
        drawn += Content.styled(TEXTURES[part] * cells, _part_style(part))
    drawn = drawn.pad_right(max(width - len(drawn), 0))
    if done > widest:
        drawn = drawn[: width - 1] + _bold(CUT)
    return drawn if edge < 0 else drawn[:edge] + _bold(EDGE) + drawn[edge + 1 :]


def _part_style(part: str) -> str:
    if part in WHOLE_STEP:
        return "$primary"
    return "$foreground 60%" if part == "overhead" else "$secondary"


def parts(memories: dict[str, Memory], chosen: str, width: int) -> list[Content]:
    """The legend with the size of each part, a column per method; of those beside the chosen one,
    as many as fit.
    """
    unit, names = unit_of(memory.peak for memory in memories.values()), list(memories)
    count = (width - 13) // (CELL + 5)
    shown = [names[n] for n in around(range(len(names)), names.index(chosen), count)]
    titles = [f"{'▶' * (name == chosen)}{name}" for name in shown]
    rows: list[Sequence[Content | str]] = [[f"{unit} at peak", *titles]]
    for part in PARTS:
        if any(memory.parts()[part] for memory in memories.values()):
            head = Content.assemble((TEXTURES[part], _part_style(part)), f" {part}")
            rows.append([head, *(unit.format(memories[name].parts()[part]) for name in shown)])
    head, *others = grid(rows, CELL + 4)
    return [head.stylize("bold"), *others]


# Parameters, formulas, pins


def details(result: Result, width: int) -> Iterator[Content]:
    """Parameters by kind of projection, the rule of thumb's count, notes, and the formula of each
    number.
    """
    model, method = result.model, result.method
    rows = list(map(cells_of, projections(model, method)))
    head, *others = grid([PROJECTION, *rows])
    if not rows:
        yield Content(" · ".join(f"{name} {n:,}" for name, n in model.components().items()))
    elif head.cell_length <= width:
        yield from (head.stylize("bold"), *others)
    else:  # two lines each
        yield _bold("projection  in → out, count, parameters; A and B")
        for name, shape, a, b, count, total in rows:
            yield Content(f"{name}  {shape}  × {count} = {total}")
            yield _muted(f"    A {a}, B {b}")
    simplified = method.simple_count(model)
    if simplified is None:
        yield _muted("the rule of thumb 2·r·d does not apply to this method")
    else:
        counts = f"{simplified:,} · exact {result.trainable:,}"
        yield Content.assemble(("rule of thumb ", "bold"), counts)
        yield _muted(why_they_differ(model, method) or "they agree")
    published = [f"published as {model.published} parameters"] if model.published else []
    for note in (*published, *model.notes, *method.notes(model)):
        yield _muted(f"note: {note}")
    yield from (Content(), _bold("Each number, with its values"))
    for what, formula in explain(model, method, result.run, result.memory):
        yield Content.assemble((f"{what}  ", "bold"), formula)


def pinned(pins: Sequence[Result], now: Result) -> list[Content]:
    """A column per pinned configuration; `±` is the difference to the current one."""
    unit = unit_of(each.memory.peak for each in (*pins, now))
    used = [part for part in PARTS if any(pin.memory.parts()[part] for pin in pins)]
    names = ["pinned", "trainable", "  ± now", f"peak, {unit}", "  ± now", "fits", "on", *used]
    columns, heads = [names], []
    for mark, pin in zip(MARKS, pins, strict=False):
        heads.append(_bold(f"{mark} {pin.title}"))
        peak, count, sizes = pin.memory.peak, pin.trainable, pin.memory.parts()
        columns.append(
            [
                mark,
                f"{count:,}",
                format_count_change(count - now.trainable),
                unit.format(peak),
                unit.format_change(peak - now.memory.peak),
                "✓ yes" if pin.spare >= 0 else "✗ no",
                pin.device.label,
                *(unit.format(sizes[part]) for part in used),
            ]
        )
    return [*heads, *grid([*zip(*columns, strict=True)], CELL + 3)]
