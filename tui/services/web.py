"""`lora-tui --web`: the app in a browser on this machine, for whoever has the URL that it prints.

A page of any site can send requests to localhost, and a WebSocket knows no same-origin policy; what gets through sees
the screen and types. So every request must name this server as its host (a site whose name was pointed at 127.0.0.1
does not), come from no other origin, and know a token. The token is the first part of every path, the WebSocket's
and the static files' included, and in no cookie: a browser sends the cookies of localhost to all its ports, where
other programs listen.
"""

import asyncio
import secrets
import shlex
import sys
from errno import EADDRINUSE
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from textual_serve.server import Server

from pipeline.errors import UserError

NAMES = ("localhost", "127.0.0.1", "[::1]")


class TokenServer(Server):  # type: ignore[misc]  # textual-serve is not type-checked here
    """textual-serve's server behind a token; everything else gets 403."""

    def __init__(self, command: str, port: int) -> None:
        super().__init__(command, host="localhost", port=port, title="lora")
        self._token = secrets.token_urlsafe()
        self._hosts = {f"{name}:{port}" for name in NAMES} | ({*NAMES} if port == 80 else set())
        self._browsers: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"{self.public_url}/{self._token}/"

    async def _make_app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.add_subapp(f"/{self._token}/", await super()._make_app())
        app.router.add_get("/download/{key}", self.handle_download)  # textual-serve's script has this path built in
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        first = request.path.split("/")[1]
        download = first == "download" and request.method == "GET"
        known = download or secrets.compare_digest(first.encode(), self._token.encode())
        if not (known and self._from_here(request)):
            raise web.HTTPForbidden(text="Open the URL that lora-tui printed.\n")
        response = await handler(request)
        if not response.prepared:
            response.headers["Referrer-Policy"] = "no-referrer"  # the page loads a font from another site
        return response

    def _from_here(self, request: web.Request) -> bool:
        hosts, origins = request.headers.getall("Host", []), request.headers.getall("Origin", [])
        return (
            len(hosts) == 1
            and hosts[0].lower() in self._hosts
            and {*origins} <= {f"http://{host}" for host in self._hosts}
        )

    async def handle_download(self, request: web.Request) -> web.StreamResponse:
        """A file that the app hands out. Its key is as good as a token: random, and told over the WebSocket alone."""
        try:
            response: web.StreamResponse = await super().handle_download(request)
        except web.HTTPNotFound:
            raise web.HTTPForbidden from None
        return response

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        task = asyncio.current_task()
        assert task is not None
        self._browsers.add(task)
        try:
            socket: web.WebSocketResponse = await super().handle_websocket(request)
        finally:
            self._browsers.discard(task)
        return socket

    async def on_startup(self, _: web.Application) -> None:
        """Without textual-serve's banner."""

    async def on_shutdown(self, _: web.Application) -> None:
        """Hang up, instead of waiting until the browsers do."""
        for task in self._browsers:
            task.cancel()

    def serve(self, debug: bool = False) -> None:  # noqa: ARG002  # textual-serve calls it so
        """Until Ctrl+C. Requests are not logged: their paths hold the token. Raises OSError if the port is taken."""

        def listening(_: str) -> None:
            print(f"Open {self.url}\nWhoever has this URL can run the pipeline. Ctrl+C ends the server.", flush=True)

        web.run_app(self._make_app(), host=self.host, port=self.port, access_log=None, print=listening)


def serve(params: Path, port: int) -> None:
    """Serve the app until Ctrl+C. Raises UserError if the port cannot be had."""
    command = shlex.join([sys.executable, "-P", "-m", "tui", "--params", str(params)])
    try:
        TokenServer(command, port).serve()
    except OSError as error:
        why = "is in use" if error.errno == EADDRINUSE else f"cannot be opened: {error.strerror}"
        raise UserError(f"port {port} {why}. Name another with --port.") from None
