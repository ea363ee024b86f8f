"""A server of `lora serve` in a thread of the test's process."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.inference.http.models import Sources
from pipeline.inference.http.server import Access, HttpServer
from tests.helpers.projects import wait_for

PATIENCE = 20.0


@contextmanager
def serving(
    sources: Sources | Callable[[], Sources], access: Access | None = None, **options: Any
) -> Iterator[HttpServer]:
    """A server on a free port of this machine; it is stopped afterwards."""
    scan = sources if callable(sources) else lambda: sources
    server = HttpServer(scan, access or Access(), 0, **options)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    wait_for(lambda: server.uvicorn.started)
    yield server
    server.uvicorn.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


def ask(
    server: HttpServer, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, content (parsed if it is JSON) and headers of an answer. A `body` of bytes is sent as
    it is.
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if data is None else "POST"), path, data, names)
    answer = connection.getresponse()
    content, given = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    if given.get("content-type") == "application/json":
        return answer.status, json.loads(content), given
    return answer.status, content.decode(), given
