"""The Curves screen: time to redraw three long runs and a sweep, and memory while following a
growing file.
"""

import asyncio
import math
import random
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

from textual.app import App, ComposeResult
from textual.color import Color

from bench.measure import Row, in_turns
from pipeline.files.file_tail import FileTail
from pipeline.project.logs.run_log import COLUMNS, step_parser
from pipeline.project.logs.run_log import Row as LogRow
from pipeline.project.stage_graph import Look
from pipeline.stages.registry import STAGES
from pipeline.views.looks import other_look
from pipeline.views.series import Log
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis, Line
from tui.widgets.colors import look_style, look_variables

POINTS, ROUNDS, GOAL = 100_000, 21, 0.030
SHOWN = ("finetune_full", "finetune_freeze", "finetune_lora")
ADAPTERS, STEPS = 32, 3_000  # sweep
APPENDS = 1_000
DATA_BYTES = 8 * (len(COLUMNS) + 3) * POINTS  # one float per column, and three smoothed ones


def curves() -> Iterator[Row]:
    """Decimate and draw 3 × 100,000 points at 200 × 60, and a sweep of 32 adapters; then follow a
    file to which 100,000 lines are appended in pieces."""
    times = asyncio.run(_time_redraws())
    seconds, sweep_seconds, single = (times[name] for name in ("three", "sweep", "runs"))
    what = f"redraw of 3 × {POINTS:,} points"
    yield Row(what, seconds, "", None, f"under {GOAL * 1e3:.0f} ms", seconds < GOAL)
    what, ratio = f"redraw of a sweep of {ADAPTERS} × {STEPS:,} points", sweep_seconds / single
    yield Row(what, sweep_seconds, f"{ADAPTERS} single runs", ratio, "at most 1 ×", ratio <= 1)
    seconds, growth = _follow_file()
    ratio = growth / DATA_BYTES
    what = f"{POINTS:,} lines followed"
    yield Row(
        what,
        seconds,
        f"memory: their {DATA_BYTES / 1e6:.0f} MB of numbers",
        ratio,
        "under 1.5 ×",
        ratio < 1.5,
    )


def rows(seed: int, points: int = POINTS) -> list[LogRow]:
    """Log rows with a noisy, decreasing loss."""
    noise = random.Random(seed)
    losses = [
        (2 + seed) * math.exp(-i * 3.3 / points) + 0.3 * noise.random() for i in range(points)
    ]
    return [
        (i + 1, i // 1000 + 1, loss, 1e-3, noise.random(), 16 * i) for i, loss in enumerate(losses)
    ]


class _Charts(App[None]):
    """A plot for each redraw: one whose labels change is drawn twice."""

    def compose(self) -> ComposeResult:
        yield from (Plot(), Plot(), Plot())

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return look_variables(Color.parse("#000000"))


async def _time_redraws() -> dict[str, float]:
    """Median seconds from the log to the rendered lines."""
    three, many = _logs(len(SHOWN), POINTS), _logs(ADAPTERS, STEPS)
    looks = [look for name in SHOWN if (look := STAGES[name].look)]
    async with _Charts().run_test(size=(200, 3 * 60)) as pilot:
        charts = list(pilot.app.query(Plot))

        def draw(
            chart: Plot, logs: Sequence[Log], looks: Sequence[Look], points: int, dim: int = 0
        ) -> None:
            def series(columns: int) -> list[Line]:
                lines = []
                for number, (log, look) in enumerate(zip(logs, looks, strict=True)):
                    found, is_top = log.series["loss"].visible(1, points, columns), log is logs[-1]
                    band = [column[:3] for column in found] if is_top else []
                    plain, style = [(c.x, c.mean) for c in found], look_style(look)
                    named = ("", "", "") if number < dim else ("name", "1.0", look.sign)
                    lines.append(Line(plain, style, *named, band, bold=is_top))
                return lines

            chart.show(series, Axis(range=(1, points)))
            chart.render_lines(chart.size.region)

        await pilot.pause()
        sweep = [STAGES["finetune_sweep"].look or other_look(0)] * ADAPTERS
        return in_turns(
            {
                "three": lambda: draw(charts[0], three, looks, POINTS),
                "sweep": lambda: draw(charts[1], many, sweep, STEPS, dim=ADAPTERS - 1),
                "runs": lambda: draw(charts[2], many, [*map(other_look, range(ADAPTERS))], STEPS),
            },
            ROUNDS,
        )


def _logs(count: int, points: int) -> list[Log]:
    logs = [Log(0.9) for _ in range(count)]
    for seed, log in enumerate(logs):
        log.extend(rows(seed, points))
    return logs


def _follow_file() -> tuple[float, int]:
    """Seconds to read the file, and the growth of memory in bytes."""
    lines = [",".join(map(str, row)) + "\n" for row in rows(0)]
    elapsed, size = 0.0, POINTS // APPENDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loss.csv"
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        tail, log = FileTail(path, step_parser), Log(0.9)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for first in range(0, POINTS, size):
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines[first : first + size])
            start = time.perf_counter()
            log.extend(tail.read().rows)
            elapsed += time.perf_counter() - start
        growth = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    return elapsed, growth
