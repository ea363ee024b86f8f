"""Admits requests: from a known host and origin, with the key, of limited size and time."""

import asyncio
import hmac
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from pipeline.inference.http.app import error_response
from pipeline.inference.http.errors import ApiError
from pipeline.inference.http.metrics import Metrics

MAX_BODY_BYTES = 2**20
# a larger body is read up to here, so that its sender sees the answer
MAX_DISCARDED_BYTES = 2**24
ARRIVAL_SECONDS = 10.0  # for the body
OPEN = ("/health",)  # without a key


class Guard:
    """ASGI middleware: admits a request, reads it, and ends with its client.

    `hosts`: allowed names in the Host header; None allows every one, which is safe only with a key.
    A page of another origin cannot know the key, but without one, a browser would send its requests
    here (DNS rebinding).
    """

    def __init__(
        self,
        app: Router,
        hosts: Sequence[str] | None,
        origins: Sequence[str],
        key: str | None,
        metrics: Metrics,
    ) -> None:
        self._app, self._hosts, self._origins, self._metrics = app, hosts, origins, metrics
        self._paths = {route.path for route in app.routes if isinstance(route, Route)}
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        # Prometheus keeps a series for each label: only known paths are labels
        route = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        try:
            self._admit(scope)
            body = await _read(receive)
            if body is not None:
                await self._run(scope, body, receive, counted)
        except Exception as error:
            if not started:
                await error_response(error)(scope, receive, counted)
            else:
                error_response(error)  # logs an unexpected error: the response has begun

    def _admit(self, scope: Scope) -> None:
        """Raises ApiError for a request that must not be answered."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            raise _closing(
                403,
                f"Host {host[:100]} is not served. Use 127.0.0.1, or start `lora serve` with "
                "--host.",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            raise _closing(
                403,
                f"Pages of {origin[:100]} may not use this server. Start it with --allow-origin.",
            )
        given = headers.get("authorization", "").encode("latin-1", "replace")
        if (
            self._key is not None
            and scope["path"] not in OPEN
            and not hmac.compare_digest(given, b"Bearer " + self._key)
        ):
            raise _closing(
                401,
                "The API key is missing or wrong. Send `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application, and cancel it when the client goes."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            # never returns: this task is cancelled when the client disconnects
            await asyncio.Event().wait()
            raise AssertionError

        # With an "app", Starlette raises 404 and 405 instead of writing them in a format of its
        # own.
        answer = asyncio.ensure_future(self._app({**scope, "app": self._app}, replay, send))
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
                with suppress(asyncio.CancelledError):
                    await answer
        if not answer.cancelled():
            answer.result()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Receive) -> bytes | None:
    """The body; None if the client is gone. Raises ApiError 413 or 408."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(ARRIVAL_SECONDS):
            while size <= MAX_DISCARDED_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    body += part
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise _closing(
            408, f"The request took longer than {ARRIVAL_SECONDS:g} seconds to arrive."
        ) from None
    if size > MAX_BODY_BYTES:
        raise _closing(413, f"The body must have at most {MAX_BODY_BYTES} bytes.")
    return bytes(body)


def _closing(status: int, message: str, code: str | None = None) -> ApiError:
    """An answer before the request was read, so that nothing else can follow on the connection."""
    return ApiError(status, message, code=code, headers={"Connection": "close"})


def _hostname(host: str) -> str:
    """The Host header without its port, in lower case; empty if it is not valid."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
