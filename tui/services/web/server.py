"""`lora-tui --web`: the app in a browser on this machine, protected by a token in the URL that it
prints.

Any website can send requests to localhost, and WebSockets have no same-origin policy; a request
that gets through can see the screen and type. So every request must name this server as its host
(which stops DNS rebinding), come from no other origin, and carry a token. The token is the first
part of every path, including the WebSocket's and those of the static files. It is not a cookie,
because a browser sends the cookies of localhost to every port, and so to other programs.
"""

import secrets
import shlex
import sys
from collections.abc import Sequence
from errno import EADDRINUSE
from pathlib import Path

import textual_serve.server
from aiohttp import web
from aiohttp.typedefs import Handler
from textual_serve.app_service import AppService
from textual_serve.server import Server

from pipeline.errors import UserError

PAGE = Path(__file__).parent  # its app_index.html
CLOSING = 0.5  # seconds that the browsers get when it ends
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class WaitedApp(AppService):  # type: ignore[misc]  # as the server below
    """textual-serve's app process, which has exited once it is stopped: asyncio would warn of one
    that exits after Ctrl+C has closed the event loop.
    """

    async def stop(self) -> None:
        await super().stop()
        if self._process:
            await self._process.wait()


class TokenServer(Server):  # type: ignore[misc]  # textual-serve is not type-checked here
    """textual-serve's server behind a token; requests without it get 403."""

    def __init__(self, command: str, port: int) -> None:
        super().__init__(
            command, host="localhost", port=port, title="LoRA workbench", templates_path=PAGE
        )
        self._token = secrets.token_urlsafe()
        self._hosts = {f"{name}:{port}" for name in LOCAL_HOSTS} | (
            {*LOCAL_HOSTS} if port == 80 else set()
        )

    @property
    def url(self) -> str:
        return f"{self.public_url}/{self._token}/"

    async def _make_app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.add_subapp(f"/{self._token}/", await super()._make_app())
        # hard-coded in textual-serve's script
        app.router.add_get("/download/{key}", self.handle_download)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        first = request.path.split("/")[1]
        download = first == "download" and request.method == "GET"
        authorized = download or secrets.compare_digest(first.encode(), self._token.encode())
        hosts, origins = request.headers.getall("Host", []), request.headers.getall("Origin", [])
        named = len(hosts) == 1 and hosts[0].lower() in self._hosts
        if not (authorized and named and {*origins} <= {f"http://{host}" for host in self._hosts}):
            raise web.HTTPForbidden(text="Open the URL that lora-tui printed.\n")
        response = await handler(request)
        if not response.prepared:
            response.headers["Referrer-Policy"] = "no-referrer"  # the URL holds the token
        return response

    async def on_startup(self, _: web.Application) -> None:
        """Override: do not print textual-serve's banner."""

    def serve(self, debug: bool = False) -> None:  # noqa: ARG002  # name given by textual-serve
        """Serve until Ctrl+C, without a log: paths of requests hold the token. Raises OSError if
        the port is taken.
        """

        textual_serve.server.AppService = WaitedApp  # where its server finds the class

        def print_url(_: str) -> None:
            warning = "Whoever has this URL can run the pipeline. Ctrl+C ends the server."
            print(f"Open {self.url}\n{warning}", flush=True)

        web.run_app(
            self._make_app(),
            host=self.host,
            port=self.port,
            access_log=None,
            print=print_url,
            shutdown_timeout=CLOSING,
        )


def serve(arguments: Sequence[str], port: int) -> None:
    """Serve `lora-tui ARGUMENTS` until Ctrl+C. Raises UserError if the port cannot be opened."""
    command = shlex.join([sys.executable, "-P", "-m", "tui", *arguments])
    try:
        TokenServer(command, port).serve()
    except OSError as error:
        reason = "is in use" if error.errno == EADDRINUSE else f"cannot be opened: {error.strerror}"
        raise UserError(f"port {port} {reason}. Choose another with --port.") from None
