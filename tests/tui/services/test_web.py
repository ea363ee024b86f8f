"""`lora-tui --web`: only requests with its URL reach the app; other sites do not."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("aiohttp.web")
pytest.importorskip("textual_serve")

LORA_TUI = [sys.executable, "-m", "tui", "--web", "--port"]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Served:
    """A running `lora-tui --web`: its process, port and URL."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port: int = free.getsockname()[1]
        self.process = subprocess.Popen(
            [*LORA_TUI, str(self.port)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().removeprefix("Open ").strip()
        self.path = "/" + self.url.split("/", 3)[3]


@pytest.fixture
def served(empty: Path) -> Iterator[Served]:
    server = Served(empty)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.communicate()


async def painted(browser: Any, text: str) -> None:
    """Wait until the app has drawn `text`."""
    await browser.send_json(["resize", {"width": 100, "height": 30}])
    seen = ""
    while text not in seen:
        message = await asyncio.wait_for(browser.receive(), 30)
        seen += message.data.decode(errors="replace") if isinstance(message.data, bytes) else ""


@pytest.mark.slow
async def test_the_app_is_served_at_the_url_that_is_printed(served: Served) -> None:
    assert re.fullmatch(rf"http://localhost:{served.port}/[\w-]{{40,}}/", served.url)
    async with aiohttp.ClientSession() as session:
        page = await (await session.get(served.url)).text()
        address = re.search(r'session-websocket-url="([^"]+)"', page)
        script = re.search(r'script src="([^"]+)"', page)
        assert address and script
        links = re.findall(r'(?:href|src)="(http[^"]+)"|url\("(http[^"]+)"\)', page)
        assert links and all(
            "".join(link).startswith(served.url) for link in links
        )  # nothing is fetched from elsewhere
        assert (await session.get(script[1])).status == 200
        async with session.ws_connect(
            f"{address[1]}?width=100&height=30", origin=served.url.rsplit("/", 2)[0]
        ) as it:
            await painted(it, "pretrain")
            await it.send_json(["stdin", "2"])
            await painted(it, "No runs")


def foreign(port: int) -> dict[str, dict[str, str]]:
    """Headers of requests that do not come from the page itself."""
    here = f"localhost:{port}"
    return {
        "origin": {"Origin": "http://evil.example"},
        "origin on another port": {"Origin": f"http://localhost:{port + 1}"},
        "https": {"Origin": f"https://{here}"},
        "origin of a sandbox": {"Origin": "null"},
        "host": {"Host": f"evil.example:{port}"},
        "host and origin": {
            "Host": f"evil.example:{port}",
            "Origin": f"http://evil.example:{port}",
        },
        "host without a port": {"Host": "localhost"},
        "host with a suffix": {"Host": f"{here}.evil.example"},
    }


async def test_everything_else_is_forbidden(served: Served) -> None:
    base, token = f"http://localhost:{served.port}", served.path.strip("/")
    async with aiohttp.ClientSession() as session:
        for path in (
            "/",
            "/ws",
            "/static/js/textual.js",
            "/static/",
            "/download/x",
            f"/{token[:-1]}/",
            f"/{token}x/ws",
        ):
            assert (await session.get(base + path)).status == 403, path
            assert (await session.post(base + path)).status == 403, path
        for name, headers in foreign(served.port).items():
            for path in ("", "ws", "static/js/textual.js"):
                assert (await session.get(served.url + path, headers=headers)).status == 403, (
                    name,
                    path,
                )
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"{served.url}ws", headers=headers)
            assert refused.value.status == 403, name


@pytest.mark.slow
async def test_ctrl_c_ends_it_and_the_apps_behind_it_without_a_traceback(served: Served) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{served.url}ws?width=100&height=30") as it,
    ):
        await painted(it, "pretrain")
        served.process.send_signal(signal.SIGINT)
        _, errors = await asyncio.to_thread(served.process.communicate, timeout=20)
    assert (served.process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_message(served: Served, empty: Path) -> None:
    command = [*LORA_TUI, str(served.port)]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    message = f"error: port {served.port} is in use. Choose another with --port.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


class Browser:
    """A tab of Chromium, driven by the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer: dict[str, Any] = await asyncio.wait_for(self._socket.receive_json(), 60)
            if answer.get("id") == self._number:
                return dict(answer["result"])

    async def value(self, script: str) -> Any:
        answer = await self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        return answer["result"].get("value")

    async def open(self, url: str) -> None:
        await self.ask("Page.navigate", url=url)
        await self.until("document.readyState == 'complete'")

    async def until(self, script: str) -> None:
        async with asyncio.timeout(60):
            while not await self.value(script):
                await asyncio.sleep(0.1)


@asynccontextmanager
async def chromium(home: Path) -> AsyncIterator[Browser]:
    """A new headless Chromium."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking"
    )
    more = "--disable-component-update --disable-sync --remote-debugging-port=0"
    command = [CHROMIUM, *flags.split(), *more.split(), f"--user-data-dir={home}", "about:blank"]
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
                yield Browser(socket)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


CONNECT = """new Promise(done => {
    const socket = new WebSocket(%r);
    socket.onopen = () => done("open");
    socket.onerror = () => done("refused");
})"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
async def test_chromium_shows_the_app_and_lets_no_other_page_connect(
    served: Served, tmp_path: Path
) -> None:
    address = f"ws://localhost:{served.port}{served.path}ws"
    other = aiohttp.web.Application()
    other.router.add_get("/", lambda _: aiohttp.web.Response(text="another site"))
    runner = aiohttp.web.AppRunner(other)
    await runner.setup()
    await (site := aiohttp.web.TCPSite(runner, "127.0.0.1", 0)).start()
    try:
        async with chromium(tmp_path / "browser") as browser:
            await browser.open(served.url)
            # the app has drawn
            await browser.until("document.body.classList.contains('-first-byte')")
            # it has the keys without a click
            await browser.until("document.activeElement.tagName == 'TEXTAREA'")
            assert await browser.value(CONNECT % address) == "open"
            await browser.open(site.name)
            assert await browser.value(CONNECT % address) == "refused"
            await browser.open(f"http://localhost:{site.name.rsplit(':', 1)[1]}")
            assert await browser.value(CONNECT % address) == "refused"
    finally:
        await runner.cleanup()
