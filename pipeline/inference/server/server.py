"""The engine in a process of its own: JSON lines in, JSON lines out. `python -m pipeline.inference.server.server`.

A request is an object with an integer `id`, `do` and fields; every answer repeats the `id` and has an `event`. The
last one to a request is "done", "error" (`message`, `kind`: user, memory or busy) or "cancelled"; only `generate`
answers before, with "token". docs/decisions/0006-inference-process.md has the list and the reasons.

The end of stdin ends the process at once: a parent that died leaves nothing behind.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from pipeline.errors import UserError, first_line, is_out_of_memory
from pipeline.inference.server.handlers import RequestHandler
from pipeline.inference.server.request import Request

WAITING = 64  # requests; further ones are told that it is busy
LONGEST = 2**20  # bytes of a request
FAILED_DEVICE = 3  # exit code: after it nothing on the device is to be trusted
_BROKEN = ("CUDA error", "CUBLAS_STATUS", "cuDNN error", "MPS backend")


@dataclass(frozen=True)
class Job:
    """A request that waits or is worked on."""

    id: int
    fields: dict[str, Any]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Server:
    """One thread reads and cancels, the calling one works; both answer."""

    def __init__(self, answers: RequestHandler, read: BinaryIO, write: BinaryIO) -> None:
        self._answers, self._from, self._to = answers, read, write
        self._queue: queue.Queue[Job] = queue.Queue(WAITING)
        self._jobs: dict[int, Job] = {}
        self._writing = threading.Lock()

    def run(self) -> None:
        """Work on requests until the process ends."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            job = self._queue.get()
            self._work(job)
            self._jobs.pop(job.id, None)

    def _read(self) -> None:
        """Take requests until there are no more, then end the process, whatever it is doing."""
        try:
            for line in _lines(self._from):
                self._take(line)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _take(self, line: bytes) -> None:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        id_ = fields.get("id") if isinstance(fields, dict) else None
        if type(id_) is not int or id_ in self._jobs:
            self._refuse(id_, UserError(f"a request is a JSON object with an integer id of its own: {line[:80]!r}."))
        elif fields.get("do") == "cancel":
            self._cancel(id_, fields.get("target"))
        elif fields.get("do") == "status":
            self._work(Job(id_, fields))  # at once, also while the other thread works
        else:
            self._enqueue(Job(id_, fields))

    def _cancel(self, id_: int, target: object) -> None:
        """One that is over already, or that never was, is no error: the last answer may be on its way."""
        job = self._jobs.get(target) if isinstance(target, int) else None
        if job is not None:
            job.cancelled.set()
        self._say(id_, event="done", target=target)

    def _enqueue(self, job: Job) -> None:
        self._jobs[job.id] = job
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            del self._jobs[job.id]
            self._refuse(job.id, UserError(f"{WAITING} requests wait already. Ask again later."), kind="busy")

    def _work(self, job: Job) -> None:
        """Answer until the last answer, or until it is cancelled: no answer follows a cancellation but that it was."""
        try:
            if job.cancelled.is_set():
                self._say(job.id, event="cancelled")
                return
            for answer in self._answers.to(job.fields.get("do"), Request(job.fields)):
                if job.cancelled.is_set():
                    self._say(job.id, event="cancelled")
                    return
                self._say(job.id, **answer)
        except (UserError, OSError) as error:
            self._refuse(job.id, error)
        except (RuntimeError, MemoryError) as error:
            reason = device_failure(error)
            if reason is None:
                raise
            self._refuse(job.id, UserError(reason), kind="memory")
            os._exit(FAILED_DEVICE)

    def _refuse(self, id_: object, error: UserError | OSError, kind: str = "user") -> None:
        message = (
            f"{error.filename or 'file'}: {error.strerror or error}." if isinstance(error, OSError) else str(error)
        )
        self._say(id_, event="error", message=message, kind=kind)

    def _say(self, id_: object, **answer: Any) -> None:
        line = json.dumps({"id": id_, **answer}).encode() + b"\n"
        with self._writing:
            try:
                self._to.write(line)
                self._to.flush()
            except BrokenPipeError:
                os._exit(1)  # nobody reads: the parent is gone


def device_failure(error: BaseException) -> str | None:
    """What to tell of an error after which the process must end, or None for any other error."""
    if is_out_of_memory(error):
        return f"the memory ran out ({first_line(error)}); load fewer or smaller models, or give a shorter prompt"
    if any(sign in str(error) for sign in _BROKEN):
        return f"the device failed ({first_line(error)})"
    return None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines; of one that is too long only the beginning, which is no JSON."""
    while line := file.readline(LONGEST):
        rest = line
        while len(rest) == LONGEST and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST)
        yield line


def main() -> None:
    """Serve stdin and stdout; what libraries print goes to stderr."""
    answers_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        Server(RequestHandler(), sys.stdin.buffer, answers_to).run()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the reading thread holds stdin: an ordinary exit would wait for it


if __name__ == "__main__":
    main()
