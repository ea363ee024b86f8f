"""The calculator of `lora-tui`: time from a key press to the redrawn screen, at 120×40, in this
process.
"""

import asyncio
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from rich.console import RenderableType
from textual import events
from textual._compositor import CompositorUpdate
from textual.screen import Screen

from bench.measure import Row
from tui.app import Workbench
from tui.panes.form import Form
from tui.screens.calculator.screen import PAUSE

GOAL = 0.03  # seconds
KEYS = {  # model → field → keys typed into it
    "qwen3-8b": {
        "rank": "128",
        "batch": "32",
        "sequence": "8192",
        "targets": "q_proj, v_proj",
        "precision": "nf4",
    },
    "gemma-3-27b": {
        "rank": "128",
        "batch": "32",
        "sequence": "8192",
        "targets": "all-linear",
        "precision": "nf4",
    },
}


def calculator() -> Iterator[Row]:
    """Type a configuration; report the median and the slowest key press."""
    # the terminal UI has none of the libraries that other benchmarks have loaded into this process
    gc.freeze()
    for model in KEYS:
        times = asyncio.run(_time_key_presses(model))
        for statistic, seconds in (("median", median(times)), ("worst", max(times))):
            name = f"calculator, {model}, key press to redraw, {statistic} of {len(times)}"
            yield Row(name, seconds, "", None, "under 30 ms", seconds < GOAL)


class _TimedWorkbench(Workbench):
    """Records when it last painted; renders the text, which a screen without a terminal would
    skip.
    """

    last_paint = 0.0

    def _display(self, screen: Screen[object], renderable: RenderableType | None) -> None:
        if isinstance(renderable, CompositorUpdate):
            renderable.render_segments(self.console)
        super()._display(screen, renderable)
        self.last_paint = time.perf_counter()


async def _time_key_presses(model: str) -> Sequence[float]:
    """Seconds per key press, beginning with the model's name."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        app = _TimedWorkbench(Path(folder) / "params.yaml")
        async with app.run_test(size=(120, 40)) as pilot:
            app.switch_mode("calculator")
            await pilot.pause(0.5)
            for field, keys in {"model": model, **KEYS[model]}.items():
                form = app.screen.query_one(Form)
                form.input.cursor_blink = False
                form.point(field)
                form.take_focus()
                await asyncio.sleep(0.1)
                times += [await _press(app, key) for key in keys]
    return times


async def _press(app: _TimedWorkbench, key: str) -> float:
    """Seconds until the last paint caused by the key; waits less than PAUSE, after which the slow
    search starts.
    """
    driver = app._driver
    assert driver is not None
    start = time.perf_counter()
    driver.send_message(events.Key(key, key))
    await asyncio.sleep(PAUSE * 0.9)
    return app.last_paint - start
