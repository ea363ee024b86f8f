"""The Curves screen: redraw of three long runs, and memory while one is followed for an hour."""

import asyncio
import math
import random
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from textual.app import App, ComposeResult
from textual.widget import Widget

from bench.measure import Row
from pipeline.looks import METHODS
from pipeline.metrics import COLUMNS
from tui.follow import Tail
from tui.series import Log, parse_step
from tui.series import Row as LogRow
from tui.widgets.curve import Curve, View
from tui.widgets.loss_chart import LossChart

POINTS, ROUNDS, GOAL = 100_000, 21, 0.050
APPENDS = 1_000
DATA = 8 * (len(COLUMNS) + 3) * POINTS  # bytes: a number a column, and three smoothed


def curves() -> Iterator[Row]:
    """Decimate and draw 3 × 100,000 points at 200 × 60; then 100,000 lines appended in pieces and followed."""
    seconds = asyncio.run(_redraw())
    what = f"redraw of 3 × {POINTS:,} points"
    yield Row(what, seconds, "", None, f"under {GOAL * 1e3:.0f} ms", seconds < GOAL)
    seconds, grown = _followed()
    ratio = grown / DATA
    what = f"{POINTS:,} lines followed"
    yield Row(what, seconds, f"memory: their {DATA / 1e6:.0f} MB of numbers", ratio, "under 1.5 ×", ratio < 1.5)


def rows(seed: int) -> list[LogRow]:
    """A loss that falls, with noise."""
    noise = random.Random(seed)
    losses = [(2 + seed) * math.exp(-i / 30_000) + 0.3 * noise.random() for i in range(POINTS)]
    return [(i + 1, i // 1000 + 1, loss, 1e-3, noise.random(), 16 * i) for i, loss in enumerate(losses)]


class _Chart(App[None]):
    def compose(self) -> ComposeResult:
        yield LossChart("loss", "loss")


async def _redraw() -> float:
    """Median seconds from the numbers to the lines of the terminal."""
    logs = [Log(0.9) for _ in METHODS]
    for seed, log in enumerate(logs):
        log.extend(rows(seed))
    times = []
    async with _Chart().run_test(size=(200, 60)) as pilot:
        chart = pilot.app.query_one(LossChart)
        for _ in range(ROUNDS):
            await pilot.pause()
            start = time.perf_counter()
            chart.draw([_curve(log, method, chart.columns) for log, method in zip(logs, METHODS, strict=True)], _VIEW)
            for widget in chart.walk_children(Widget):
                widget.render()
                widget.render_lines(widget.size.region)
            times.append(time.perf_counter() - start)
    return median(times)


_VIEW = View((1, POINTS))


def _curve(log: Log, method: str, columns: int) -> Curve:
    look = METHODS[method]
    return Curve(log.series["loss"].visible(*_VIEW.x, columns), look.color, look.sign)


def _followed() -> tuple[float, int]:
    """Seconds to read it all, and bytes that are there after and were not before."""
    lines = [",".join(map(str, row)) + "\n" for row in rows(0)]
    spent, size = 0.0, POINTS // APPENDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loss.csv"
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        tail, log = Tail(path, parse_step), Log(0.9)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for first in range(0, POINTS, size):
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines[first : first + size])
            start = time.perf_counter()
            log.extend(tail.read().rows)
            spent += time.perf_counter() - start
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    return spent, grown
