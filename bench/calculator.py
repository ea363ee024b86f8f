"""The calculator of `lora-tui`: from a key press to the redrawn screen, at 120×40, in this process."""

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from rich.console import RenderableType
from textual import events
from textual._compositor import CompositorUpdate
from textual.screen import Screen

from bench.commands import ROOT
from bench.measure import Row
from tui.app import Workbench
from tui.screens.calculator.screen import PAUSE
from tui.widgets.text_field import Entry

GOAL = 0.03  # seconds
TYPED = {  # model → field → keys in it
    "qwen3-8b": {"rank": "128", "batch": "32", "sequence": "8192", "targets": "q_proj, v_proj", "precision": "nf4"},
    "gemma-3-27b": {"rank": "128", "batch": "32", "sequence": "8192", "targets": "all-linear", "precision": "nf4"},
}


def calculator() -> Iterator[Row]:
    """A configuration typed letter by letter: the median and the worst key press."""
    for model in TYPED:
        found = asyncio.run(_typed(model))
        for what, seconds in (("median", median(found)), ("worst", max(found))):
            name = f"calculator, {model}, key press to redraw, {what} of {len(found)}"
            yield Row(name, seconds, "", None, "under 30 ms", seconds < GOAL)


class _Painted(Workbench):
    """Knows when it last painted; a screen without a terminal would not make the text of what it paints."""

    CSS_PATH = str(ROOT / "tui" / "app.tcss")  # a path alone would be beside this file
    last = 0.0

    def _display(self, screen: Screen[object], renderable: RenderableType | None) -> None:
        if isinstance(renderable, CompositorUpdate):
            renderable.render_segments(self.console)
        super()._display(screen, renderable)
        self.last = time.perf_counter()


async def _typed(model: str) -> Sequence[float]:
    """Seconds of each key press, the model's name first."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        app = _Painted(Path(folder) / "params.yaml")
        async with app.run_test(size=(120, 40)) as pilot:
            app.action_go("calculator")
            await pilot.pause(0.5)
            for field, keys in {"model": model, **TYPED[model]}.items():
                entry = app.screen.query_one(f"#{field}", Entry)
                entry.cursor_blink = False
                entry.focus()
                await asyncio.sleep(0.1)
                times += [await _press(app, key) for key in keys]
    return times


async def _press(app: _Painted, key: str) -> float:
    """Seconds until the last paint that the key led to; the longer search begins later than it is waited for."""
    driver = app._driver
    assert driver is not None
    start = time.perf_counter()
    driver.send_message(events.Key(key, key))
    await asyncio.sleep(PAUSE * 0.9)
    return app.last - start
