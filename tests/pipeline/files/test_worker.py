"""A child process that is asked from a thread: answers in order, and every way in which it ends."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files.worker import Worker

Start = Callable[[str], Worker]
SERVER = """
from pipeline.files import worker
def handle(request):
    if request.do == "fail":
        raise worker.UserError("no.\\nAsk again.")
    for number in range(request.fields.get("times", 0)):
        print("what libraries print")
        yield {"event": "part", "data": bytes(number)}
    yield {"event": "done", "do": request.do}
worker.serve(lambda: handle)
"""


@pytest.fixture
def start() -> Iterator[Start]:
    started = list[Worker]()

    def start(program: str) -> Worker:
        started.append(Worker((sys.executable, "-c", program), subprocess.DEVNULL))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


def test_answers_come_in_order_with_the_bytes_that_follow_them(start: Start) -> None:
    worker = start(SERVER)
    worker.send("first", times=3)
    worker.send("fail")
    worker.send("second")
    heard = [worker.read(60) for _ in range(4)]
    assert [(answer["id"], answer["event"], len(data)) for answer, data in heard] == [
        (1, "part", 0),
        (1, "part", 1),
        (1, "part", 2),
        (1, "done", 0),
    ]
    with pytest.raises(UserError, match=r"no\.␊Ask again\."):
        worker.read(60)
    assert worker.read(60)[0] == {"id": 3, "event": "done", "do": "second"}


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("raise SystemExit(4)", 4),
        ("import os; os.abort()", -signal.SIGABRT),
        ("print('hello', flush=True); import time; time.sleep(20)", -signal.SIGKILL),
        ("print('[1]', flush=True); import time; time.sleep(20)", -signal.SIGKILL),
    ],
)
def test_a_process_that_ends_or_writes_no_answer_is_at_its_end(
    start: Start, program: str, code: int
) -> None:
    worker = start(program)
    worker.send("anything")
    with pytest.raises(EOFError):
        worker.read(60)
    assert worker.process.wait(60) == code


def test_a_process_that_says_nothing_is_waited_for_as_long_as_asked(start: Start) -> None:
    worker = start("import time; time.sleep(20)")
    with pytest.raises(TimeoutError):
        worker.read(0.01)
    worker.kill()
    assert worker.process.poll() == -signal.SIGKILL


def test_what_the_process_started_ends_with_it(start: Start) -> None:
    worker = start(
        "import subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\n"
        'print(\'{"id": 1, "event": "done", "pid": %d}\' % child.pid, flush=True)\ntime.sleep(60)'
    )
    pid = worker.read(60)[0]["pid"]
    worker.kill()
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_an_error_that_nobody_foresaw_ends_the_process(start: Start) -> None:
    worker = start(SERVER.replace("yield", "1 / 0; yield"))
    worker.send("first")
    with pytest.raises(EOFError):
        worker.read(60)
    assert worker.process.wait(60) == 1
