"""`lora-tui --web`: only requests with its URL reach the app; other sites do not."""

import asyncio
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import LORA_TUI, Served, chromium, needs_chromium, serving

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("aiohttp.web")


@pytest.fixture
def served(empty: Path) -> Iterator[Served]:
    with serving(empty) as server:
        yield server


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
            f"{address[1]}?width=100&height=30", origin=served.origin
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
            f"/{token[:-1]}/",
            f"/{token}x/ws",
        ):
            assert (await session.get(base + path)).status == 403, path
            assert (await session.post(base + path)).status == 403, path
        # its key is the secret
        assert (await session.get(f"{base}/download/x")).status == 404
        assert (await session.post(f"{base}/download/x")).status == 403
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


STATUS = "performance.getEntriesByType('navigation')[0].responseStatus"
CONNECT = """new Promise(done => {
    const socket = new WebSocket(%r);
    socket.onopen = () => done("open");
    socket.onerror = () => done("refused");
})"""


@pytest.mark.slow
@needs_chromium
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
        async with chromium(tmp_path / "browser") as tab:
            await tab.open(served.url)
            # the app has drawn
            await tab.until("document.body.classList.contains('-first-byte')")
            # it has the keys without a click
            await tab.until("document.activeElement.tagName == 'TEXTAREA'")
            assert await tab.value(CONNECT % address) == "open"
            await tab.open(f"{served.origin}/")
            assert await tab.value(STATUS) == 403
            await tab.open(site.name)
            assert await tab.value(CONNECT % address) == "refused"
            await tab.open(f"http://localhost:{site.name.rsplit(':', 1)[1]}")
            assert await tab.value(CONNECT % address) == "refused"
    finally:
        await runner.cleanup()
