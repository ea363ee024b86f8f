"""Memory of several methods: stacked bars against the size of a GPU, and a table of the parts."""

from collections.abc import Mapping, Sequence

from rich.text import Text

from pipeline.calc.fit import Gpu
from pipeline.calc.memory import PARTS, Memory
from pipeline.calc.report import SHADES, gib
from tui.widgets.text import Lines, cells

SIGNS = dict(zip(PARTS, "█◆▓▒░≡·", strict=True))  # parts differ in symbol too, not only in colour
EDGE = "│"  # where the GPU ends


class MemoryBars(Lines):
    """Shows the bars and the table; `chosen` is the method of the form."""

    def compare(self, memories: Mapping[str, Memory], chosen: str, device: Gpu) -> None:
        self.show(lambda width: [*bars(memories, chosen, device, width), Text(), *numbers(memories, chosen, width)])


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
        line = Text(f"{'▶' if name == chosen else ' '} {name}".ljust(name_width), "bold" if name == chosen else "")
        line.append_text(_bar(memory, bar_width, widest, edge))
        sign = "" if memory.peak <= device.bytes else " ✗"
        lines.append(line.append(f" {gib(memory.peak)}{sign}", "bold" if name == chosen else ""))
    return lines


def _bar(memory: Memory, bar_width: int, widest: int, edge: int) -> Text:
    bar, done, filled = Text(), 0, 0
    for part, size in memory.parts().items():
        done += size
        end = round(done / widest * bar_width)
        bar.append(SIGNS[part] * (end - filled), SHADES[part])
        filled = end
    bar.append(" " * (bar_width - filled))
    return Text.assemble(bar[:edge], (EDGE, "bold"), bar[edge + 1 :])


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
