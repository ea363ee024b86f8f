"""`make pictures`: those of README.md and docs/tui.md, from the real program on this project, its runs and models."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from pipeline.workbench import open_project
from tui.app import Workbench

HERE = Path(__file__).resolve().parent
PARAMS = HERE.parent / "params.yaml"
PROJECT = open_project(PARAMS)
SIZE = (112, 34)
Steps = Callable[[Pilot[None]], Awaitable[None]]


async def until(pilot: Pilot[None], holds: Callable[[Any], object]) -> None:
    """Wait until something holds of the screen."""
    end = time.monotonic() + 60
    while not holds(pilot.app.screen):
        if time.monotonic() > end:
            raise SystemExit(f"{pilot.app.screen} did not come to rest. Run `make repro` first.")
        await asyncio.sleep(0.05)
    await pilot.pause()


async def pipeline(pilot: Pilot[None]) -> None:
    await until(pilot, lambda screen: len(screen.states) == len(PROJECT.stages))
    await pilot.press(*["down"] * list(PROJECT.stages).index("finetune_lora"))
    await until(pilot, lambda screen: screen.chosen == "finetune_lora")


async def curves(pilot: Pilot[None]) -> None:
    await pilot.press("2")
    await pilot.pause(2)
    await pilot.press("l", "g")


async def calculator(pilot: Pilot[None]) -> None:
    await pilot.press("3")
    await until(pilot, lambda screen: "most that fits:" in str(screen.query_one("#verdict").content))


async def adapters(pilot: Pilot[None]) -> None:
    await pilot.press("4")
    await until(
        pilot,
        lambda screen: len(screen.entries) >= len(PROJECT.variants) and all(entry.verdict for entry in screen.entries),
    )
    await pilot.press("u", "p", *"der", "space", *"wind", "enter")
    await until(pilot, answered)
    await pilot.pause(1)


def answered(screen: Any) -> bool:
    """Whether every model has said all that it says."""
    answers = screen.conversation.newest.answers if screen.conversation.newest else []
    return len(answers) == len(PROJECT.variants) and all(a.error or a.ended in ("end", "length") for a in answers)


async def main() -> None:
    for steps in (pipeline, curves, calculator, adapters):
        app = Workbench(PARAMS)
        app.folder_label = "~/lora-workbench"
        async with app.run_test(size=SIZE) as pilot:
            await steps(pilot)
            await pilot.pause(0.5)
            (HERE / "pictures").mkdir(exist_ok=True)
            (HERE / f"pictures/{steps.__name__}.svg").write_text(app.export_screenshot(), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
