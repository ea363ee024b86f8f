"""`make pictures`: those of README.md and docs/reference/screens.md, from the real program on the
demo project.
"""

import asyncio
import os
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from tui.app import Workbench
from tui.registry import SCREENS
from tui.services.projects.demo import open_demo

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "pictures"
SIZES = ((80, 24), (120, 40), (200, 60))
THEMES = {"dark": "lora-dark", "light": "lora-light"}
Steps = Callable[[Pilot[None]], Awaitable[None]]


async def until(pilot: Pilot[None], holds: Callable[[Any], object]) -> None:
    """Wait until something holds of the screen."""
    end = time.monotonic() + 120
    while not holds(pilot.app.screen):
        if time.monotonic() > end:
            raise SystemExit(f"{pilot.app.screen} did not come to rest.")
        await asyncio.sleep(0.05)
    await pilot.pause()


def text(screen: Any) -> str:
    """All that is drawn."""
    return "\n".join("".join(s.text for s in strip) for strip in screen._compositor.render_strips())


async def pipeline(pilot: Pilot[None]) -> None:
    await until(pilot, lambda screen: "gate failed" in text(screen) and "6 ✓" in text(screen))
    await pilot.press(*["down"] * 3)


async def curves(pilot: Pilot[None]) -> None:
    await until(pilot, lambda screen: "4 of 4 on" in text(screen) and "finished" in text(screen))


async def results(pilot: Pilot[None]) -> None:
    await until(pilot, lambda screen: "forgot least" in text(screen))


async def data(pilot: Pilot[None]) -> None:
    await until(pilot, lambda screen: "tokens  " in text(screen) and "warnings" in text(screen))


async def models(pilot: Pilot[None]) -> None:
    await until(pilot, lambda screen: "unmeasured" in text(screen) and "72%" in text(screen))
    await pilot.press("space", *["down"] * 3, "space", "enter")
    await pilot.press(*keys("The capital of France is"), "enter")
    await pilot.pause(6)


async def chat(pilot: Pilot[None]) -> None:
    app = pilot.app
    assert isinstance(app, Workbench)
    app.go("chat", models=[app.root / "artifacts/base", app.root / "artifacts/lora_adapter"])
    await until(pilot, lambda screen: "base beside lora" in text(screen))
    for message in ("Do you like rock climbing?", "Where did you do that?"):
        await pilot.press(*keys(message), "enter")
        await pilot.pause(5)


def keys(typed: str) -> list[str]:
    """The keys that type a text."""
    return ["space" if character == " " else character for character in typed]


async def calculator(pilot: Pilot[None]) -> None:
    await until(pilot, lambda screen: "FITS" in text(screen) and "at most" in text(screen))


async def monitor(pilot: Pilot[None]) -> None:
    await pilot.pause(20)


STEPS: Mapping[str, Steps] = {
    steps.__name__: steps
    for steps in (pipeline, curves, results, data, models, chat, calculator, monitor)
}


async def draw(params: Path, name: str, size: tuple[int, int], theme: str) -> None:
    app = Workbench(params)
    async with app.run_test(size=size) as pilot:
        app.folder_label, app.theme = "~/demo", THEMES[theme]
        app.switch_mode(name)
        await until(pilot, lambda screen: getattr(screen, "NAME", "") == name)
        await STEPS[name](pilot)
        await pilot.pause(0.5)
        path = FOLDER / f"{name}-{size[0]}x{size[1]}-{theme}.svg"
        path.write_text(without_fonts(app.export_screenshot()), encoding="utf-8")


def without_fonts(svg: str) -> str:
    """The picture in the machine's own monospace font: Rich's would be fetched from the network."""
    return re.sub(r"[ \t]*@font-face \{[^}]*\}\n", "", svg)


def page() -> str:
    """docs/reference/screens.md: every screen in every size, dark and light."""
    parts = [
        "# Every screen\n\nFrom the real program on its demo (`lora-tui --demo`); `make pictures` "
        "renews them.\n"
    ]
    for name, entry in SCREENS.items():
        parts.append(f"## {entry.label}\n")
        for columns, rows in SIZES:
            parts += [
                f"![{entry.label}, {columns}×{rows}, "
                f"{theme}](../pictures/{name}-{columns}x{rows}-{theme}.svg)\n"
                for theme in THEMES
            ]
    return "\n".join(parts)


async def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.svg"):
        path.unlink()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {f"XDG_{kind}_HOME": home for kind in ("CACHE", "STATE", "CONFIG")}
        params = open_demo()
        for name in SCREENS:
            for size in SIZES:
                for theme in THEMES:
                    await draw(params, name, size, theme)
    (HERE / "reference/screens.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
