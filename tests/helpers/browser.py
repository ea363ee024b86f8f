"""`lora-tui --web`, and a headless Chromium in which a test types into it and reads it.

Chromium is driven by its DevTools protocol over a WebSocket of aiohttp, which textual-serve brings.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("textual_serve")

LORA_TUI = [sys.executable, "-m", "tui", "--web", "--port"]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")


class Served:
    """A running `lora-tui --web`: its process, port and URL."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port: int = free.getsockname()[1]
        self.process = subprocess.Popen(
            [*LORA_TUI, str(self.port), *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().removeprefix("Open ").strip()
        self.origin, token = self.url.rstrip("/").rsplit("/", 1)
        self.path = f"/{token}/"


@contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[Served]:
    """`lora-tui --web ARGUMENTS` in `folder`, on a free port."""
    served = Served(folder, *arguments, **environment)
    try:
        yield served
    finally:
        served.process.terminate()
        served.process.communicate()


# Bits and key codes of the DevTools protocol; a letter's code is that of its capital.
MODIFIERS = {"Alt": 1, "Ctrl": 2, "Shift": 8}
KEY_CODES = {"Enter": 13, "Escape": 27, "Home": 36} | {f"F{n}": 111 + n for n in range(1, 13)}
# What a browser does at a key unless the page prevents it; the protocol must be told.
EDITS = {"Ctrl+V": ("paste",)}

# The page keeps its terminal to itself, so it is caught where textual-serve's script stores it.
CATCH_TERMINAL = """
Object.defineProperty(Object.prototype, "terminal", { configurable: true, set(terminal) {
    delete Object.prototype.terminal;
    this.terminal = window.terminal = terminal;
} })"""
ROWS = """window.terminal ? Array.from({ length: terminal.rows }, (_, row) =>
    terminal.buffer.active.getLine(row).translateToString(true, 0, terminal.cols)) : []"""
MARKED = """(() => {
    const line = terminal.buffer.active.getLine(%d);
    const cells = Array.from({ length: terminal.cols }, (_, column) => line.getCell(column));
    const colours = (cell) => `${cell.isInverse()} ${cell.getBgColor()}`;
    return cells.filter((cell) => colours(cell) != colours(cells[0]))
        .map((cell) => cell.getChars()).join("");
})()"""
BOX = """(() => {
    const { width, height } = document.querySelector(".xterm-screen").getBoundingClientRect();
    return [terminal.cols, terminal.rows, width, height];
})()"""


class Tab:
    """A tab of Chromium, and the terminal of xterm.js in it."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self._events: list[dict[str, Any]] = []

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer: dict[str, Any] = await asyncio.wait_for(self._socket.receive_json(), 60)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise ConnectionError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._events.append(answer)

    async def value(self, script: str) -> Any:
        answer = await self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, f"{script}: {answer}"
        return answer["result"].get("value")

    async def open(self, url: str) -> None:
        await self.ask("Page.navigate", url=url)
        await self.until("document.readyState == 'complete'")

    async def until(self, script: str) -> None:
        """Wait until a script's value is true."""
        async with asyncio.timeout(60):
            while True:
                with suppress(ConnectionError):  # the tab is between two pages
                    if await self.value(script):
                        return
                await asyncio.sleep(0.1)

    async def take_errors(self) -> list[str]:
        """What the console has shown as errors since this was last asked."""
        await self.value("0")  # what was on its way has come
        events, self._events = self._events, []
        errors = []
        for event in events:
            method, params = event["method"], event["params"]
            entry = params.get("entry", {})
            if (
                method == "Runtime.exceptionThrown"
                or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"))
                or (method == "Log.entryAdded" and entry["level"] == "error")
            ):
                errors.append(entry.get("text") or str(params))
        return errors

    # The terminal

    async def rows(self) -> list[str]:
        """What the terminal shows. A row is as long as the part of it that was ever written."""
        return list(await self.value(ROWS))

    async def see(self, *texts: str, seconds: float = 60) -> list[str]:
        """Wait until all of `texts` are on the screen, and return its rows."""
        end = time.monotonic() + seconds
        while True:
            rows = await self.rows()
            screen = "\n".join(rows)
            if all(text in screen for text in texts):
                return rows
            assert time.monotonic() < end, f"{texts} did not appear:\n{screen}"
            await asyncio.sleep(0.05)

    async def marked(self, row: int) -> str:
        """The text of a row that has another background than its first cell."""
        return str(await self.value(MARKED % row))

    async def box(self) -> tuple[int, int, float, float]:
        """Columns and rows of the terminal, and its width and height in pixels."""
        columns, rows, width, height = await self.value(BOX)
        return columns, rows, width, height

    async def resize(self, columns: int, rows: int) -> None:
        """Make the window as large as so many cells, and wait until the terminal has them."""
        columns_now, rows_now, width, height = await self.box()
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=ceil(columns * width / columns_now),
            height=ceil(rows * height / rows_now),
            deviceScaleFactor=1,
            mobile=False,
        )
        await self.until(f"terminal.cols == {columns} && terminal.rows == {rows}")

    async def press(self, *names: str) -> None:
        """Press keys by their names: q, F2, Ctrl+Shift+C."""
        for name in names:
            *held, key = name.split("+")
            modifiers = sum(MODIFIERS[modifier] for modifier in held)
            await self._key(key, modifiers, EDITS.get(name, ()))

    async def type(self, text: str) -> None:
        for character in text:
            await self._key(character)

    async def _key(self, key: str, modifiers: int = 0, commands: tuple[str, ...] = ()) -> None:
        code = KEY_CODES.get(key) or ord(key.upper())
        text = {"text": key} if len(key) == 1 and not modifiers else {}
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            await self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
                commands=list(commands) if kind != "keyUp" else [],
                **(text if kind != "keyUp" else {}),
            )

    async def click(self, text: str) -> None:
        """Click on the start of a text on the screen."""
        row, column = await self._place(text)
        for kind in ("mousePressed", "mouseReleased"):
            await self._mouse(kind, row, column + 0.5)

    async def drag(self, text: str, *held: str) -> None:
        """Drag the mouse over a text on the screen."""
        row, column = await self._place(text)
        end = column + len(text) - 0.2
        await self._mouse("mousePressed", row, column + 0.2, *held)
        await self._mouse("mouseMoved", row, end, *held)
        await self._mouse("mouseReleased", row, end, *held)

    async def _place(self, text: str) -> tuple[int, int]:
        """The row and the column at which a text begins."""
        rows = await self.see(text)
        row = next(number for number, line in enumerate(rows) if text in line)
        return row, rows[row].index(text)

    async def _mouse(self, kind: str, row: int, column: float, *held: str) -> None:
        columns, rows, width, height = await self.box()
        await self.ask(
            "Input.dispatchMouseEvent",
            type=kind,
            x=column * width / columns,
            y=(row + 0.5) * height / rows,
            button="left",
            buttons=int(kind != "mouseReleased"),
            clickCount=1,
            modifiers=sum(MODIFIERS[modifier] for modifier in held),
        )


@asynccontextmanager
async def chromium(home: Path) -> AsyncIterator[Tab]:
    """A tab of a new headless Chromium, which may use its clipboard."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--remote-debugging-port=0"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={home}", "about:blank"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        async with asyncio.timeout(60):
            while (
                not (port_file := home / "DevToolsActivePort").is_file()
                or "\n" not in port_file.read_text()
            ):
                await asyncio.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            tabs = await (await session.get(f"http://127.0.0.1:{port}/json/list")).json()
            page = next(tab for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.ask(f"{domain}.enable")
                await tab.ask("Page.addScriptToEvaluateOnNewDocument", source=CATCH_TERMINAL)
                await tab.ask(
                    "Browser.grantPermissions",
                    permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
                )
                yield tab
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
