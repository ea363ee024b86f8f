"""Memory of several methods: a bar each, stacked by part, against the size of a GPU; and each part in numbers."""

from collections.abc import Mapping, Sequence

from rich.text import Text

from pipeline.calc.fit import Gpu
from pipeline.calc.memory import PARTS, Memory
from pipeline.calc.report import SHADES, gib
from tui.widgets.text_block import Lines, cells

SIGNS = dict(zip(PARTS, "█◆▓▒░≡·", strict=True))  # a part is told by its sign too, not by its colour alone
EDGE = "│"  # where the GPU ends


class MemoryBars(Lines):
    """`chosen` names the method that is asked for."""

    def compare(self, memories: Mapping[str, Memory], chosen: str, device: Gpu) -> None:
        self.show(lambda width: [*bars(memories, chosen, device, width), Text(), *numbers(memories, chosen, width)])


def bars(memories: Mapping[str, Memory], chosen: str, device: Gpu, width: int) -> Sequence[Text]:
    """One line a method, and above them where the device ends."""
    name_width = max(map(len, memories)) + 3
    room = max(10, width - name_width - 12)
    widest = max(device.bytes, *(memory.peak for memory in memories.values()))
    edge = min(room - 1, round(device.bytes / widest * room))
    label = f"{device.label} {gib(device.bytes)} GiB"
    before = name_width + edge
    head = f"{label} ▼".rjust(before + 1) if len(label) + 1 < before else f"{' ' * before}▼ {label}"
    lines = [Text(head, "bold")]
    for name, memory in memories.items():
        line = Text(f"{'▶' if name == chosen else ' '} {name}".ljust(name_width), "bold" if name == chosen else "")
        line.append_text(_bar(memory, room, widest, edge))
        sign = "" if memory.peak <= device.bytes else " ✗"
        lines.append(line.append(f" {gib(memory.peak)}{sign}", "bold" if name == chosen else ""))
    return lines


def _bar(memory: Memory, room: int, widest: int, edge: int) -> Text:
    bar, done, filled = Text(), 0, 0
    for part, size in memory.parts().items():
        done += size
        until = round(done / widest * room)
        bar.append(SIGNS[part] * (until - filled), SHADES[part])
        filled = until
    bar.append(" " * (room - filled))
    return Text.assemble(bar[:edge], (EDGE, "bold"), bar[edge + 1 :])


def numbers(memories: Mapping[str, Memory], chosen: str, width: int) -> Sequence[Text]:
    """The legend with each part's size, one column a method; the peak last."""
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
