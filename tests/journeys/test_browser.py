"""A journey through `lora-tui --web` in a real browser: a finished project, every screen, three
sizes.
"""

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.browser import Served, Tab, chromium, needs_chromium, serving
from tui.registry import SCREENS

pytestmark = [needs_chromium, pytest.mark.slow]

SMALL, USUAL, LARGE = (60, 16), (80, 24), (160, 48)
CHAT_KEY = "F7"
RUNS = "/-first-byte$/.test(document.body?.className)"
SCROLL_BARS = """(() => {
    const page = document.documentElement, terminal = document.querySelector(".xterm-viewport");
    return [
        innerWidth - page.clientWidth, innerHeight - page.clientHeight,
        terminal.offsetWidth - terminal.clientWidth,
    ];
})()"""
LEAVES = 'dispatchEvent(new Event("beforeunload", { cancelable: true }))'


async def shows(tab: Tab, number: int) -> None:
    """Wait until the header marks the screen of this number, and every cell of it is drawn."""
    entry = [*SCREENS.values()][number - 1]
    names = f"{number} {entry.label}", f"{number} {entry.short}"
    end = time.monotonic() + 60
    while await tab.marked(0) not in names or not await is_drawn(tab):
        screen = "\n".join(await tab.rows())
        assert time.monotonic() < end, f"{names[0]} is not drawn in {await tab.box()}:\n{screen}"
        await asyncio.sleep(0.05)


async def is_drawn(tab: Tab) -> bool:
    """Whether the app fills the terminal, the terminal the window, and the last row, at its right
    end, names the palette's key.
    """
    columns, rows, width, height = await tab.box()
    window_width, window_height = await tab.value("[innerWidth, innerHeight]")
    is_filled = (
        0 <= window_width - width < width / columns
        and 0 <= window_height - height < height / rows
        and not any(await tab.value(SCROLL_BARS))
    )
    lines = await tab.rows()
    return is_filled and {len(line) for line in lines} == {columns} and "Ctrl+P" in lines[-1]


@pytest.fixture
def served(project: Path, tmp_path: Path) -> Iterator[Served]:
    """A finished project in `lora-tui --web`."""
    home = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("CONFIG", "STATE", "CACHE")}
    with serving(project, **home) as server:
        yield server


async def test_every_screen_is_drawn_in_every_size_and_the_keyboard_mouse_and_clipboard_work(
    served: Served, tmp_path: Path
) -> None:
    async with chromium(tmp_path / "browser") as tab:
        await tab.open(served.url)
        await tab.see("expand_vocab", "quit")
        for size in (USUAL, LARGE, SMALL):
            await tab.press(CHAT_KEY)
            await shows(tab, 6)
            await tab.type("der")  # near the end of the window, where the page's own field then is
            await tab.see(" der")
            await tab.resize(*size)
            await shows(tab, 6)
            await tab.press("Ctrl+U")
            for number in range(1, len(SCREENS) + 1):
                await tab.press(f"F{number + 1}")
                await shows(tab, number)
        for number in (1, 2, 3, 4, 5, 8):  # the others begin in a field, where a digit is a letter
            await tab.press(str(number))
            await shows(tab, number)

        await tab.resize(*USUAL)
        await shows(tab, 8)
        await tab.click("3 Results")
        await shows(tab, 3)

        await clipboard(tab)
        assert await tab.take_errors() == []

        assert not await tab.value(LEAVES)  # the browser asks before it closes the tab
        await tab.press("F2")
        await shows(tab, 1)
        await tab.press("q")
        await tab.until("document.body.innerText.includes('The program has ended.')")
        assert await tab.value(LEAVES)
        await tab.value("document.querySelector('.closed button').click()")
        await tab.until(RUNS)
        await shows(tab, 1)

        children = psutil.Process(served.process.pid).children(recursive=True)
        assert children
        served.process.send_signal(signal.SIGINT)
        output, errors = await asyncio.to_thread(served.process.communicate, timeout=30)
        assert (served.process.returncode, errors) == (0, "")
        assert "Traceback" not in output
        assert not psutil.wait_procs(children, timeout=30)[1]
        await tab.until("document.body.classList.contains('-closed')")


async def clipboard(tab: Tab) -> None:
    """Text goes from the keyboard and the clipboard to a field, from there to the clipboard, and
    so does what is selected on the screen.
    """
    await tab.press(CHAT_KEY)
    await shows(tab, 6)
    await tab.type("der hund")
    await tab.value("navigator.clipboard.writeText(' bellt')")
    await tab.press("Ctrl+V")
    await tab.see("der hund bellt")
    await tab.press("Shift+Home", "Ctrl+C")
    await clipboard_has(tab, "der hund bellt")
    await tab.drag("hund", "Shift")
    await tab.press("Ctrl+Shift+C")
    await clipboard_has(tab, "hund")
    await tab.press("Ctrl+U")


async def clipboard_has(tab: Tab, text: str) -> None:
    await tab.until(f"navigator.clipboard.readText().then((text) => text === '{text}')")
