"""`make recordings`: short recordings of the real program in a terminal, as SVG that moves by
itself (CSS keyframes).

A recording is a strip of frames, shown one after the other. Rows that are alike are stored once.
Waiting is cut short. Who prefers reduced motion sees the last frame. `python -m docs.recordings
NAME` renews one.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from docs.terminal import Terminal
from docs.tour import TUTORIALS, Shell, Typed, Written, fresh, steps, untested

FOLDER = Path(__file__).with_name("recordings")
WIDTH, HEIGHT, FONT = 8.4, 18, 14  # of a character, in pixels
FAMILY = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
SHORTEST, PAUSE = 0.06, 1.0  # seconds that a frame is seen
LAST = 4.0  # seconds of the last frame
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
BACK, FORE = "#11151c", "#d5dae3"
COLORS = {
    "black": "#11151c",
    "red": "#e06c75",
    "green": "#98c379",
    "brown": "#e5c07b",
    "blue": "#61afef",
    "magenta": "#c678dd",
    "cyan": "#56b6c2",
    "white": "#d5dae3",
}
SHELL = "PS1='$ ' exec bash --norc"


class Span(NamedTuple):
    """A stretch of a line in one color: `cells` wide from `column` on, with its text, or without as
    a background.
    """

    column: int
    cells: int
    color: str
    text: str = ""
    bold: bool = False


Row = tuple[Span, ...]


class Frame(NamedTuple):
    """What stands on the screen from a time on, in seconds of the program."""

    at: float
    rows: tuple[Row, ...]


class Recorder:
    """Frames of a terminal while it is driven, at most one in `every` seconds."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal, self.every = terminal, 0.0
        self.frames: list[Frame] = []

    def look(self) -> None:
        screen, now = self.terminal.screen, time.monotonic()
        rows = tuple(_row(screen.buffer[line], screen.columns) for line in range(screen.lines))
        if not self.frames or rows != self.frames[-1].rows:
            if self.frames and now - self.frames[-1].at < self.every:
                now = self.frames.pop().at
            self.frames.append(Frame(now, rows))

    def until(self, holds: Callable[[str], object], seconds: float = 900) -> None:
        """Record until something holds of the text on the screen. Raises TimeoutError with the
        screen.
        """
        self.terminal.see(holds, seconds, self.look)

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda _: time.monotonic() > end)

    def type(self, text: str) -> None:
        every, self.every = self.every, 0.0
        for character in text:
            self.terminal.press(character)
            self.terminal.read(0.2)
            self.look()
        self.every = every


def _row(cells: Mapping[int, Any], columns: int) -> Row:
    """The backgrounds of a line, then its texts; a space goes with the text before it."""
    backs: list[str] = []
    looks: list[tuple[str, bool]] = []
    for column in range(columns):
        cell = cells[column]
        fore, back = _color(cell.fg, FORE), _color(cell.bg, BACK)
        if cell.reverse:
            fore, back = back, fore
        backs.append(back)
        looks.append(looks[-1] if looks and not cell.data.strip() else (fore, cell.bold))
    spans = [Span(first, wide, back) for back, first, wide in _runs(backs) if back != BACK]
    for (fore, bold), first, wide in _runs(looks):
        text = "".join(cells[column].data for column in range(first, first + wide))
        start, text = len(text) - len(text.lstrip()), text.strip()
        if text:
            spans.append(Span(first + start, len(text), fore, text, bold))
    return tuple(spans)


def _runs(values: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """(value, where its run begins, how long that is)."""
    at = 0
    for value, run in groupby(values):
        length = len(list(run))
        yield value, at, length
        at += length


def _color(name: str, default: str) -> str:
    if name == "default":
        return default
    return COLORS.get(name.removeprefix("bright")) or f"#{name}"


def svg(frames: Sequence[Frame], size: tuple[int, int], title: str, speed: float = 1) -> str:
    """The recording, `speed` × as fast as the program."""
    columns, rows = size
    width, height = columns * WIDTH + 20, rows * HEIGHT + 20
    gaps = [later.at - earlier.at for earlier, later in pairwise(frames)]
    lasting = [*(min(max(gap / speed, SHORTEST), PAUSE) for gap in gaps), LAST]
    total, at, keys = sum(lasting), 0.0, []
    for number, seconds in enumerate(lasting):
        keys.append(f"{at / total:.3%}{{transform:translateY({-number * height}px)}}")
        at += seconds
    colors: dict[str, str] = {}
    names: dict[Row, str] = {}
    strip = []
    for number, frame in enumerate(frames):
        for line, row in enumerate(frame.rows):
            if row:
                name = names.setdefault(row, f"r{len(names)}")
                strip.append(f'<use href="#{name}" y="{number * height + 10 + line * HEIGHT:g}"/>')
    drawn = (
        f'<g id="{name}">{"".join(_span(span, colors) for span in row)}</g>'
        for row, name in names.items()
    )
    definitions = "".join(drawn)
    end = (len(frames) - 1) * height
    fills = "".join(f".{name}{{fill:{color}}}" for color, name in colors.items())
    style = (
        f"text{{font:{FONT}px {FAMILY};white-space:pre}}.b{{font-weight:bold}}{fills}"
        f"#strip{{animation:play {total:.2f}s step-end infinite}}@keyframes play{{{''.join(keys)}}}"
        f"@media(prefers-reduced-motion:reduce){{#strip{{animation:none;transform:translateY({-end}px)}}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
        f"<title>{escape(title)}</title><style>{style}</style><defs>{definitions}</defs>"
        f'<rect width="100%" height="100%" rx="8" fill="{BACK}"/><svg width="{width:g}" height="{height:g}">'
        f'<g id="strip">{"".join(strip)}</g></svg></svg>\n'
    )


def _span(span: Span, colors: dict[str, str]) -> str:
    """The width of a text is given, so that columns stand below each other in every font."""
    name = colors.setdefault(span.color, f"c{len(colors)}")
    x, width = f"{10 + span.column * WIDTH:.4g}", span.cells * WIDTH
    if not span.text:
        return f'<rect class="{name}" x="{x}" width="{width + 0.3:.4g}" height="{HEIGHT}"/>'
    text = escape(span.text, quote=False)
    return f'<text class="{name}{" b" * span.bold}" x="{x}" y="14" textLength="{width:.4g}">{text}</text>'


def first_adapter(folder: Path) -> str:
    """`lora train` of docs/tutorials/first-adapter.md."""
    environment, size = {**fresh(folder), "PATH": PATH}, (100, 34)
    page = list(steps((TUTORIALS / "first-adapter.md").read_text(encoding="utf-8")))
    train = next(
        step for step in page if isinstance(step, Typed) and step.command.startswith("lora train")
    )
    shell = Shell(folder, environment)
    for step in page[: page.index(train)]:
        if isinstance(step, Written):
            shell.write(step)
        elif not untested(step.command):
            shell.type(step)
    with Terminal(SHELL, folder, size, environment) as terminal:
        recorder = Recorder(terminal)
        recorder.until(lambda text: text.startswith("$"))
        recorder.type(train.command)
        recorder.every = 1.0
        recorder.type("\n")
        recorder.until(lambda text: "Next: " in text and text.rstrip().endswith("$"))
    return svg(recorder.frames, size, f"$ {train.command}", speed=8)


def calculator(folder: Path) -> str:
    """What QLoRA of an 8B model takes, and what it costs on a GPU."""
    size = (100, 24)
    with Terminal(SHELL, folder, size, {"PATH": PATH}) as terminal:
        recorder = Recorder(terminal)
        recorder.until(lambda text: text.startswith("$"))
        recorder.type(
            "lora calc --model qwen3-8b --method qlora --gpu rtx4090 --tokens 5M --price 0.5\n"
        )
        recorder.until(lambda text: text.rstrip().endswith("\n$"), 120)
    return svg(recorder.frames, size, "lora calc")


def workbench(folder: Path) -> str:
    """`lora-tui --demo minigpt`: one screen after the other."""
    size, homes = (
        (100, 30),
        {f"XDG_{kind}_HOME": str(folder) for kind in ("CACHE", "STATE", "CONFIG", "DATA")},
    )
    seen: Sequence[tuple[str, Callable[[str], object]]] = (
        ("2", lambda text: "finished" in text),
        ("3", lambda text: "forgot least" in text),
        ("4", lambda text: "tokens" in text and "finetune" in text),
        ("5", lambda text: text.count("100%") > 4),
        ("7", lambda text: "FITS" in text),
        ("1", lambda text: "evaluate" in text),
    )
    with Terminal("lora-tui --demo minigpt", folder, size, {**homes, "PATH": PATH}) as terminal:
        recorder = Recorder(terminal)
        recorder.every = 1.2
        recorder.until(lambda text: "evaluate" in text and "quit" in text)
        recorder.rest(2)
        for key, holds in seen:
            recorder.type(key)
            recorder.until(holds)
            recorder.rest(2)
    return svg(recorder.frames, size, "lora-tui --demo minigpt", speed=2)


RECORDINGS = {"first-adapter": first_adapter, "calculator": calculator, "workbench": workbench}


def main(names: Sequence[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or RECORDINGS:
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{name}.svg").write_text(RECORDINGS[name](Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
