"""The engine in its own process: JSON lines in, JSON lines out. `python -m
pipeline.inference.server`.

A request is an object with an integer `id`, `do` and fields; every answer repeats the `id` and has
an `event`. The last answer is "done", "error" (`message`, `kind`: user, memory or busy) or
"cancelled"; only `generate` sends others before it, with "token".
docs/decisions/0006-inference-process.md has the list and the reasons.

The process exits as soon as stdin closes, so it does not outlive its parent.
"""

import json
import os
import queue
import sys
import threading
import traceback
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, BinaryIO

import torch

from pipeline.errors import UserError, first_line, is_out_of_memory
from pipeline.inference.handlers import Request, RequestHandler

MAX_WAITING = 64  # requests in the queue; more are answered with “busy”
MAX_REQUEST_BYTES = 2**20
FAILED_DEVICE = 3  # exit code after a device error, which leaves the device in an undefined state
_DEVICE_ERRORS = ("CUDA error", "CUBLAS_STATUS", "cuDNN error", "MPS backend")


@dataclass(frozen=True)
class QueuedRequest:
    """A request that is waiting or being processed."""

    id: int
    fields: dict[str, Any]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Server:
    """One thread reads requests and cancels, the calling thread processes them; both send
    answers.
    """

    def __init__(self, handler: RequestHandler, source: BinaryIO, sink: BinaryIO) -> None:
        self._handler, self._input, self._output = handler, source, sink
        self._queue: queue.Queue[QueuedRequest] = queue.Queue(MAX_WAITING)
        self._jobs: dict[int, QueuedRequest] = {}
        self._writing = threading.RLock()

    def run(self) -> None:
        """Process requests until the process ends."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            job = self._queue.get()
            self._process(job)
            self._jobs.pop(job.id, None)

    def _read(self) -> None:
        """Receive requests until stdin closes, then end the process, whatever it is doing."""
        try:
            while line := self._input.readline(MAX_REQUEST_BYTES):
                # the rest of a line that is too long is dropped: its beginning is no valid JSON
                rest = line
                while len(rest) == MAX_REQUEST_BYTES and not rest.endswith(b"\n"):
                    rest = self._input.readline(MAX_REQUEST_BYTES)
                self._receive(line)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _receive(self, line: bytes) -> None:
        """Answer a cancel or a question for the status at once, queue any other request."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        id_ = fields.get("id") if isinstance(fields, dict) else None
        if type(id_) is not int or id_ in self._jobs:
            self._send_error(
                id_,
                UserError(
                    f"a request must be a JSON object with a unique integer id, got {line[:80]!r}."
                ),
            )
        elif fields.get("do") == "cancel":
            target = fields.get("target")
            # an unknown id is no error, since the last answer may have been sent already
            with self._writing:  # what the cancelled request still says comes after this answer
                if isinstance(target, int) and (cancelled := self._jobs.get(target)):
                    cancelled.cancelled.set()
                self._send(id_, event="done", target=target)
        elif fields.get("do") == "status":
            # immediately, even while another request is being processed
            self._process(QueuedRequest(id_, fields))
        else:
            job = self._jobs[id_] = QueuedRequest(id_, fields)
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                del self._jobs[id_]
                self._send_error(
                    id_,
                    UserError(f"{MAX_WAITING} requests are waiting already. Try again later."),
                    kind="busy",
                )

    def _process(self, job: QueuedRequest) -> None:
        """Send the answers to a request; after a cancellation only the event “cancelled”."""
        try:
            if job.cancelled.is_set():
                self._send(job.id, event="cancelled")
                return
            for answer in self._handler.answer(job.fields.get("do"), Request(job.fields)):
                if job.cancelled.is_set():
                    self._send(job.id, event="cancelled")
                    return
                self._send(job.id, **answer)
        except (UserError, OSError) as error:
            self._send_error(job.id, error)
        except (RuntimeError, MemoryError) as error:
            reason = device_failure(error)
            if reason is None:
                raise
            self._send_error(job.id, UserError(reason), kind="memory")
            os._exit(FAILED_DEVICE)

    def _send_error(self, id_: object, error: UserError | OSError, kind: str = "user") -> None:
        message = (
            f"{error.filename or 'file'}: {error.strerror or error}."
            if isinstance(error, OSError)
            else str(error)
        )
        self._send(id_, event="error", message=message, kind=kind)

    def _send(self, id_: object, **answer: Any) -> None:
        line = json.dumps({"id": id_, **answer}).encode() + b"\n"
        with self._writing:
            try:
                self._output.write(line)
                self._output.flush()
            except BrokenPipeError:
                os._exit(1)  # the parent is gone


def device_failure(error: BaseException) -> str | None:
    """Message for an error after which the process must end, or None for any other error."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); load fewer or smaller models, or use a shorter "
            "prompt"
        )
    if any(sign in str(error) for sign in _DEVICE_ERRORS):
        return f"the device failed ({first_line(error)})"
    return None


def main() -> None:
    """Serve stdin and stdout; library output goes to stderr. Modules that add kinds of adapters are
    its arguments.
    """
    for module in sys.argv[1:]:
        import_module(module)
    # the descriptor too, not only sys.stdout: C libraries print past Python, and would end up
    # between two answers
    protocol_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)  # until a model is loaded, which sets its own number
    try:
        Server(RequestHandler(), sys.stdin.buffer, protocol_out).run()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the reading thread holds stdin, and a normal exit would wait for it


if __name__ == "__main__":
    main()
