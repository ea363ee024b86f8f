"""The inference process through its pipes; its answers are compared with the engine in this
process.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.files.worker import MAX_WAITING
from pipeline.inference import engine
from pipeline.inference.server import FAILED_DEVICE, device_failure
from tests.helpers.process import forked
from tests.helpers.projects import ROOT

Answer = dict[str, Any]
PATIENCE = 60


class Talk:
    """A server process and its answers. `own`: it imports everything itself, as the terminal UI's
    does.
    """

    def __init__(self, patch: str = "", own: bool = False) -> None:
        code = f"{patch}\nfrom pipeline.inference.server import main\nmain()"
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code] if own else forked("-c", code)
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(b"")  # the process ended

    def say(self, line: bytes | Answer) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(
            line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
        )
        self.process.stdin.flush()

    def hear(self) -> Answer:
        line = self._lines.get(timeout=PATIENCE)
        assert line, self.end()
        answer: Answer = json.loads(line)
        return answer

    def ask(self, id_: int, do: str, **fields: object) -> Answer:
        """The only answer to one request, with no other request in progress."""
        self.say({"id": id_, "do": do, **fields})
        return self.hear()

    def until(self, id_: int, *events: str) -> list[Answer]:
        """Everything up to the first of `events` for request `id_`."""
        heard = [self.hear()]
        while heard[-1]["id"] != id_ or heard[-1]["event"] not in events:
            heard.append(self.hear())
        return heard

    def end(self) -> tuple[int, str]:
        """Exit code and stderr, after the process ended by itself."""
        assert self.process.stderr is not None
        code = self.process.wait(PATIENCE)
        return code, self.process.stderr.read().decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def talk(request: pytest.FixtureRequest) -> Iterator[Talk]:
    talk = Talk(own=getattr(request, "param", "") == "own")
    yield talk
    talk.close()


def start_long(talk: Talk, endless: Path, id_: int) -> None:
    """The endless model generates text."""
    assert talk.ask(1000, "load", name="endless", base=str(endless))["event"] == "done"
    talk.say({"id": id_, "do": "generate", "model": "endless", "text": "w1", "limit": 16_000})
    assert talk.hear()["event"] == "token"


@pytest.mark.parametrize("talk", ["own"], indirect=True)
@pytest.mark.slow
def test_every_request_is_answered_as_the_engine_answers_it(talk: Talk, finished: Path) -> None:
    base, changes = finished / "artifacts/expanded", finished / "artifacts/lora_adapter"
    plain, lora = engine.load(base), engine.load(base, changes)
    text = "die katze liegt auf dem"
    first = talk.ask(1, "load", name="base", base=str(base), adapter=None)
    assert first == {
        **first,
        "id": 1,
        "event": "done",
        "name": "base",
        "chat": False,
    }
    assert (first["resident"], first["parameters"]) == (False, 112_768)
    assert talk.ask(2, "load", name="lora", base=str(base), adapter=str(changes))["resident"]

    answers = talk.ask(3, "top_k", models=["base", "lora"], text=text, k=3)["answers"]
    for name, loaded in (("base", plain), ("lora", lora)):
        expected = [
            {"token": c.token, "probability": c.probability} for c in engine.top_k(loaded, text, 3)
        ]
        assert answers[name]["top_k"] == expected
        probabilities = engine.next_probabilities(loaded, text)
        union = {choice["token"] for answer in answers.values() for choice in answer["top_k"]}
        ids = {token: loaded.tokenizer.encode(token)[0] for token in union}
        assert answers[name]["of"] == {
            token: float(probabilities[id_]) for token, id_ in ids.items()
        }

    talk.say({"id": 4, "do": "generate", "model": "lora", "text": text})
    *tokens, done = talk.until(4, "done")
    assert "".join(token["text"] for token in tokens).strip() == engine.complete(lora, text)
    assert (done["reason"], done["tokens"]) == ("end", len(tokens))
    probability = engine.next_probabilities(lora, text).max()
    assert tokens[0]["probability"] == pytest.approx(float(probability), abs=1e-5)

    modules = talk.ask(6, "spectrum", adapter=str(changes))["modules"]
    assert [set(module) for module in modules] == [{"name", "rank", "values", "share_of_first"}] * 8
    status = talk.ask(7, "status")
    assert (status["pid"], status["loaded"]) == (talk.process.pid, ["base", "lora"])
    assert talk.ask(8, "unload", name="lora") == {"id": 8, "event": "done", "name": "lora"}
    assert (
        "is not loaded. Loaded: base."
        in talk.ask(9, "generate", model="lora", text=text)["message"]
    )


def test_a_cancelled_generation_says_no_further_token(talk: Talk, endless: Path) -> None:
    start_long(talk, endless, 5)
    talk.say({"id": 6, "do": "cancel", "target": 5})
    heard = talk.until(5, "cancelled", "done")
    assert heard[-1] == {"id": 5, "event": "cancelled"}
    accepted = heard.index({"id": 6, "event": "done", "target": 5})
    assert len(heard) - accepted <= 3, "at most the token that was being written follows"
    assert talk.ask(7, "top_k", models=["endless"], text="w1", k=1)["event"] == "done"


def test_a_request_that_waits_is_cancelled_before_it_is_begun(talk: Talk, endless: Path) -> None:
    start_long(talk, endless, 5)
    talk.say({"id": 6, "do": "unload", "name": "endless"})
    for id_, target in ((7, 6), (8, 5)):
        talk.say({"id": id_, "do": "cancel", "target": target})
    heard = talk.until(6, "cancelled", "done", "error")
    assert heard[-1] == {"id": 6, "event": "cancelled"}
    talk.say({"id": 9, "do": "status"})
    assert talk.until(9, "done")[-1]["loaded"] == ["endless"]


def test_cancelling_what_is_over_is_no_error(talk: Talk) -> None:
    assert talk.ask(1, "cancel", target=77) == {"id": 1, "event": "done", "target": 77}


def test_status_is_answered_while_the_model_works_and_too_many_requests_are_told_that_it_is_busy(
    talk: Talk, endless: Path
) -> None:
    start_long(talk, endless, 5)
    talk.say({"id": 6, "do": "status"})
    heard = talk.until(6, "done")
    assert not [answer for answer in heard if answer["id"] == 5 and answer["event"] != "token"]
    for id_ in range(100, 100 + MAX_WAITING + 3):
        talk.say({"id": id_, "do": "unload", "name": "nothing"})
    talk.say({"id": 7, "do": "cancel", "target": 5})
    heard = talk.until(100 + MAX_WAITING - 1, "error")
    busy = [answer["id"] for answer in heard if answer.get("kind") == "busy"]
    assert busy == [100 + MAX_WAITING, 101 + MAX_WAITING, 102 + MAX_WAITING]


def test_the_end_of_stdin_ends_it_at_once_whatever_it_does(talk: Talk, endless: Path) -> None:
    start_long(talk, endless, 5)
    assert talk.process.stdin is not None
    talk.process.stdin.close()
    start = time.monotonic()
    assert talk.end() == (0, "")
    assert time.monotonic() - start < 2


@pytest.mark.slow
def test_a_killed_parent_leaves_nothing_behind() -> None:
    code = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-m', 'pipeline.inference.server']\n"
        "p = subprocess.Popen(command, stdin=-1, stdout=-1, start_new_session=True)\n"
        'p.stdin.write(b\'{"id": 1, "do": "status"}\\n\'); p.stdin.flush(); p.stdout.readline()\n'
        "print(p.pid, flush=True); input()"
    )
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except OSError:
        return False


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{\n",
        b"[]\n",
        b"[" * 9999 + b"\n",
        b"\xff\n",
        b'{"do": "status"}\n',
        b'{"id": true}\n',
        b"x" * 3 * 10**6 + b"\n",
    ],
    ids=["empty", "half", "list", "deep", "bytes", "no id", "true", "3 MB"],
)
def test_a_line_that_is_no_request_is_refused_and_the_next_is_answered(
    talk: Talk, line: bytes
) -> None:
    talk.say(line)
    refused = talk.hear()
    assert (refused["event"], refused["kind"]) == ("error", "user")
    assert "a request must be a JSON object with a unique integer id" in refused["message"]
    assert talk.ask(3, "status")["id"] == 3


@pytest.mark.slow
def test_what_libraries_print_never_reaches_the_protocol() -> None:
    talk = Talk(
        "import pipeline.models.device as d\nf = d.device_info\n"
        "d.device_info = lambda on: print('hello from C') or f(on)",
        own=True,
    )
    assert talk.ask(1, "status")["event"] == "done"
    talk.process.send_signal(signal.SIGINT)
    code, errors = talk.end()
    assert (code, errors) == (130, "hello from C\n")


MODEL = """
import torch
from pipeline.models.minigpt import MiniGPT
def broken(*_, **__): raise {}
MiniGPT.hidden_states = broken
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB')",
            "out of memory (CUDA out of memory.",
        ),
        (
            "RuntimeError('CUDA error: device-side assert\\nmore')",
            "the device failed (CUDA error: device-side assert)",
        ),
        (
            "MemoryError()",
            "out of memory (MemoryError); load fewer or smaller models, or use a shorter prompt",
        ),
    ],
)
def test_without_memory_it_says_what_to_do_and_ends(
    endless: Path, error: str, message: str
) -> None:
    talk = Talk(MODEL.format(error))
    talk.ask(1, "load", name="m", base=str(endless))
    answer = talk.ask(2, "top_k", models=["m"], text="w1", k=1)
    assert (answer["event"], answer["kind"]) == ("error", "memory")
    assert answer["message"].startswith(message)
    assert talk.end()[0] == FAILED_DEVICE


def test_an_error_of_ours_ends_it_with_a_traceback_not_an_answer(endless: Path) -> None:
    talk = Talk(MODEL.format("RuntimeError('a bug')"))
    talk.ask(1, "load", name="m", base=str(endless))
    talk.say({"id": 2, "do": "top_k", "models": ["m"], "text": "w1", "k": 1})
    code, errors = talk.end()
    assert code == 1
    assert errors.strip().endswith("RuntimeError: a bug")


def test_other_errors_are_no_failure_of_the_device() -> None:
    assert device_failure(RuntimeError("shapes differ")) is None
    assert device_failure(ValueError("")) is None
