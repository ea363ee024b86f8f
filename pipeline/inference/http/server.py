"""Runs the application in uvicorn, with limits on connections, until a signal stops it."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import Interrupted, UserError
from pipeline.inference.batching import MAX_TOKENS, BatchedGenerator
from pipeline.inference.http import models
from pipeline.inference.http.app import Api
from pipeline.inference.http.guard import Guard
from pipeline.inference.http.metrics import Metrics
from pipeline.inference.http.models import ServedModels, Sources
from pipeline.inference.model_pool import ModelPool, Prepare

# From so many connections on, a request is answered 503; beyond 1.5 times as many, a new connection
# is closed.
MAX_CONNECTIONS = 512
MAX_HEADER_BYTES = 2**15
SEND_BUFFER_BYTES = 2**17
HEADER_SECONDS = 10.0
STALLED_SECONDS = 30.0  # a client that takes nothing of what is written to it
KEEP_ALIVE_SECONDS = 30
MIN_TOKENS = 256  # of prompt and answer
DRAIN_SECONDS = 3  # for running requests when the server is stopped
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    host: str = "127.0.0.1"
    key: str | None = None
    origins: Sequence[str] = ()

    def check(self) -> None:
        """Raises UserError if others could use it without a key, or for a bad key or origin."""
        if self.key is None and not is_local(self.host):
            raise UserError(
                f"--host {self.host} can be reached from other machines, so --api-key is required. "
                "Set one, in LORA_API_KEY for example, or serve 127.0.0.1."
            )
        if self.key is not None and not (
            self.key.isascii() and self.key.isprintable() and self.key.strip()
        ):
            raise UserError(
                "--api-key must be printable ASCII characters, at least one. Choose another."
            )
        for origin in self.origins:
            scheme, _, rest = origin.partition("://")
            if not scheme or not rest or "/" in rest or "*" in origin:
                raise UserError(
                    f"--allow-origin must be like http://localhost:3000, got {origin}. Name each "
                    "origin by itself."
                )

    @property
    def hosts(self) -> Sequence[str] | None:
        """Allowed names in the Host header; None allows any, where an API key is required."""
        return (*LOCAL_HOSTS, self.host.lower()) if is_local(self.host) else None


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that reserves the port, and accepts nobody yet. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Without it, the server writes 4 MB before it notices that a client reads nothing.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot serve {host}, port {port}: {reason}. Choose another --port or --host."
        ) from None
    return bound


class LimitedConnection(H11Protocol):
    """A connection with a limit on the time for headers and for a stalled client."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        if len(self.connections) > MAX_CONNECTIONS * 3 // 2:
            transport.abort()
        self._close_after(HEADER_SECONDS, "headers")

    def data_received(self, data: bytes) -> None:
        if not self._answering:
            self._close_after(HEADER_SECONDS, "headers")
        super().data_received(data)
        if self._answering:
            self._keep("headers")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._close_after(STALLED_SECONDS, "stalled")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep("stalled")

    def connection_lost(self, exc: Exception | None) -> None:
        for reason in list(self._timers):
            self._keep(reason)
        super().connection_lost(exc)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_after(self, seconds: float, reason: str) -> None:
        """Close the connection unless `_keep` is called in time, counted from the first call."""
        if reason not in self._timers:
            self._timers[reason] = self.loop.call_later(seconds, self.transport.abort)

    def _keep(self, reason: str) -> None:
        if timer := self._timers.pop(reason, None):
            timer.cancel()


class HttpServer:
    """The API on a port, which is bound before the base is loaded: a busy port is known at once."""

    def __init__(
        self,
        scan: Callable[[], Sources],
        access: Access,
        port: int,
        adapter_folders: Sequence[Path] = (),
        trust_remote_code: bool = False,
        max_batch: int | None = None,
        max_waiting: int = 256,
        max_tokens: int | None = None,
        prepare: Prepare | None = None,
        other: Callable[[Sources, int | None, int], BatchedGenerator | None] = lambda *_: None,
    ) -> None:
        """Binds the port and loads the base. Raises UserError.

        `max_tokens`: of all running sequences; None: as many as fit into memory. `prepare`: what is
        done to a base before its first use. `other`: of the models, `max_batch` and `max_waiting`,
        what computes in place of our own generator, or None.
        """
        access.check()
        self._socket = bind(access.host, port)
        self.port: int = self._socket.getsockname()[1]
        pool = ModelPool(most=models.MAX_LOADED, most_bases=models.MAX_BASES, prepare=prepare)
        try:
            self.generator = other(scan(), max_batch, max_waiting) or BatchedGenerator(
                pool, max_batch, max_waiting, max_tokens or MAX_TOKENS
            )
        except BaseException:
            self._socket.close()
            raise
        try:
            self.models = ServedModels(
                self.generator, scan, adapter_folders, trust_remote_code, max_tokens is None
            )
            if max_tokens is None:
                self._refuse_without_room()
        except BaseException:
            self.close()
            raise
        metrics = Metrics(self.generator)
        router = Api(self.generator, self.models, metrics).router()
        app: ASGIApp = Guard(router, access.hosts, access.origins, access.key, metrics)
        if access.origins:
            app = CORSMiddleware(
                app, access.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        self.url = f"http://{f'[{access.host}]' if ':' in access.host else access.host}:{self.port}"
        self.uvicorn = uvicorn.Server(_config(app))

    def _refuse_without_room(self) -> None:
        """Raises UserError if the base leaves no memory for a short conversation."""
        if self.generator.max_tokens < MIN_TOKENS:
            raise UserError(
                f"{self.models.base} leaves memory for the keys and values of "
                f"{self.generator.max_tokens} tokens; serving needs at least {MIN_TOKENS}. Serve a "
                "smaller or quantized model, or use --device cpu."
            )

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM. Raises Interrupted."""
        stopped: list[int] = []

        def stop(number: int, _: object) -> None:
            stopped.append(number)
            self.uvicorn.should_exit = True  # also if it has not begun yet

        # uvicorn handles both itself; when it has stopped, it raises them again for these handlers
        # of ours.
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            self.serve()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if stopped:
            raise Interrupted(stopped[-1], "Stopped serving", resumes=False)

    def serve(self) -> None:
        """Serve until `uvicorn.should_exit` is set."""
        try:
            self.uvicorn.run([self._socket])
        finally:
            self.close()

    def close(self) -> None:
        self._socket.close()
        self.generator.close()


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=LimitedConnection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # what goes wrong is answered, and printed by the application
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
