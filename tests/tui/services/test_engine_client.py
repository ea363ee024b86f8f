"""The client of the inference process: with the real process and with misbehaving fakes."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.files import async_worker
from pipeline.files.async_worker import WorkerDied
from pipeline.project import process
from tests.helpers.projects import ROOT
from tui.services.engine_client import Inference

PATIENCE = 60
LONG = {"model": "endless", "text": "w1", "limit": 16_000}
Answer = dict[str, Any]


@pytest.fixture
async def engine() -> AsyncIterator[Inference]:
    engine = Inference(ROOT)
    yield engine
    await engine.stop()


StartFake = Callable[[str], Inference]


@pytest.fixture
async def start_fake() -> AsyncIterator[StartFake]:
    """Start a Python program instead of the inference process; its `say` writes a line."""
    started = list[Inference]()

    def start(program: str) -> Inference:
        say = (
            "import sys, time, os, json\ndef say(line): sys.stdout.write(line + '\\n'); "
            "sys.stdout.flush()\n"
        )
        started.append(Inference(ROOT, (sys.executable, "-c", say + program)))
        return started[-1]

    yield start
    for engine in started:
        await engine.stop()


async def ask_with_timeout(engine: Inference, do: str = "status", **fields: object) -> Answer:
    """The last answer. Fails instead of waiting forever."""
    return await asyncio.wait_for(engine.ask(do, **fields), PATIENCE)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def load(engine: Inference, folder: Path) -> None:
    await ask_with_timeout(engine, "load", name="endless", base=folder)


@pytest.mark.slow
async def test_the_first_request_starts_the_process_and_models_stay_loaded(
    engine: Inference, endless: Path
) -> None:
    assert (engine.running, engine.pid) == (False, None)
    await load(engine, endless)
    first = engine.pid
    status = await ask_with_timeout(engine)
    assert (status["event"], status["loaded"], status["pid"]) == ("done", ["endless"], first)
    assert engine.running
    await engine.stop()
    assert (engine.running, engine.pid) == (False, None)


@pytest.mark.slow
async def test_a_folder_called_pipeline_in_the_project_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/__init__.py").write_text("raise SystemExit('theirs')", encoding="utf-8")
    engine = Inference(tmp_path)
    assert (await ask_with_timeout(engine))["event"] == "done"
    await engine.stop()


@pytest.mark.slow
async def test_a_rejected_request_raises_its_reason_and_the_process_continues(
    engine: Inference,
) -> None:
    with pytest.raises(UserError, match=r"nothing is not loaded. Loaded: nothing\.") as rejected:
        await ask_with_timeout(engine, "unload", name="nothing")
    assert not isinstance(rejected.value, WorkerDied)
    assert engine.running


@pytest.mark.slow
async def test_tokens_stream_and_the_last_event_says_why_it_ended(
    engine: Inference, endless: Path
) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG | {"limit": 5})) as answers:
        heard = [answer async for answer in answers]
    assert [answer["event"] for answer in heard] == ["token"] * 5 + ["done"]
    assert (heard[-1]["reason"], heard[-1]["tokens"]) == ("length", 5)


@pytest.mark.slow
async def test_closing_a_stream_interrupts_it_and_the_next_request_is_answered_at_once(
    engine: Inference, endless: Path
) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG)) as answers:
        async for answer in answers:
            assert answer["event"] == "token"
            break
    start = time.monotonic()
    # waits in the queue behind the generation
    await ask_with_timeout(engine, "unload", name="endless")
    assert time.monotonic() - start < 1


@pytest.mark.slow
async def test_a_generation_that_is_cancelled_by_its_id_ends_with_cancelled(
    engine: Inference, endless: Path
) -> None:
    await load(engine, endless)
    heard = list[Answer]()
    async with aclosing(engine.stream("generate", **LONG)) as answers:
        async for answer in answers:
            heard.append(answer)
            if len(heard) == 3:
                await ask_with_timeout(engine, "cancel", target=answer["id"])
    assert heard[-1]["event"] == "cancelled"
    assert len(heard) < 16_000


@pytest.mark.slow
async def test_a_task_that_is_cancelled_while_it_waits_frees_the_process(
    engine: Inference, endless: Path
) -> None:
    await load(engine, endless)
    task = asyncio.create_task(engine.ask("generate", **LONG))
    await ask_with_timeout(engine)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ask_with_timeout(engine, "unload", name="endless")


@pytest.mark.slow
async def test_a_slow_reader_blocks_the_process_and_loses_nothing(
    engine: Inference, endless: Path
) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG | {"limit": 600})) as answers:
        heard = [await anext(answers)]
        await until(lambda: held_up(engine))
        assert (await ask_with_timeout(engine))["loaded"] == ["endless"], (
            "another request comes through"
        )
        heard += [answer async for answer in answers]
    assert [answer["event"] for answer in heard] == ["token"] * 600 + ["done"]


def held_up(engine: Inference) -> bool:
    """Whether the client has queued as many answers as it may."""
    assert engine._process is not None
    (request,) = engine._process._pending.values()
    assert len(request.answers) <= async_worker.MAX_QUEUED
    return len(request.answers) == async_worker.MAX_QUEUED


@pytest.mark.parametrize(
    ("sign", "why"),
    [
        (signal.SIGKILL, "it was killed, perhaps because the machine ran out of memory"),
        (15, "signal 15 (Terminated)"),
    ],
)
@pytest.mark.sampled(2)
@pytest.mark.slow
async def test_when_it_is_killed_all_pending_requests_fail_and_the_next_starts_a_new_process(
    engine: Inference, endless: Path, sign: int, why: str
) -> None:
    await load(engine, endless)
    first = engine.pid
    assert first is not None
    with pytest.raises(WorkerDied) as raised:
        async with aclosing(engine.stream("generate", **LONG)) as answers:
            await anext(answers)
            waiting = [
                asyncio.create_task(ask_with_timeout(engine, "unload", name="endless"))
                for _ in range(3)
            ]
            await ask_with_timeout(engine)  # sent after them
            os.kill(first, sign)
            async for _ in answers:
                pass
    assert why in str(raised.value)
    assert str(raised.value).endswith(". Prompt again to start a new one.")
    assert [str(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [
        str(raised.value)
    ] * 3
    assert not engine.running
    status = await ask_with_timeout(engine)
    assert status["loaded"] == []
    assert status["pid"] == engine.pid != first


DEATHS = {
    "import "
    "nowhere": "exit code 1, its last line was \"ModuleNotFoundError: No module named 'nowhere'\"",
    "sys.exit(5)": "exit code 5.",
    "os.write(2, b'x' * 10**7 + b'\\nlast \\xff\\n\\n'); "
    "sys.exit(2)": "exit code 2, its last line was 'last \ufffd'",
    "os.abort()": "signal 6 (Aborted)",
    "os.kill(os.getpid(), 35)": "signal 35 (",
    "os.close(1); time.sleep(99)": "it was killed",
    'os.write(1, b\'{"id": 1, "event"\'); sys.exit(3)': "exit code 3",
    'os.write(1, b\'{"id": 1, "event"\'); os.close(1); time.sleep(99)': "it was killed",
    "say('hello'); time.sleep(99)": "it wrote an invalid answer (hello)",
    "os.write(1, b'\\xff\\n'); time.sleep(99)": "it wrote an invalid answer (\ufffd)",
    "say('[' * 99999); time.sleep(99)": "it wrote an invalid answer ([[[[",
    "say('[]'); time.sleep(99)": "it wrote an invalid answer ([])",
    'say(\'{"event": "done"}\'); time.sleep(99)': "it wrote an invalid answer ({",
    'say(\'{"id": [], "event": "done"}\'); time.sleep(99)': "it wrote an invalid answer ({",
    'say(\'{"id": 1, "event": 7}\'); time.sleep(99)': "it wrote an invalid answer ({",
    "say('x' * 40_000_000); time.sleep(99)": "it wrote an invalid answer (",
}


@pytest.mark.parametrize(("program", "why"), DEATHS.items(), ids=range(len(DEATHS)))
async def test_a_process_that_dies_or_writes_nonsense_fails_all_requests_with_the_reason(
    start_fake: StartFake, program: str, why: str
) -> None:
    engine = start_fake(program)
    answers = await asyncio.wait_for(
        asyncio.gather(*(engine.ask("status") for _ in range(3)), return_exceptions=True), 9
    )
    for answer in answers:
        assert isinstance(answer, WorkerDied)
        assert f"The inference process ended: {why}" in str(answer)
    assert not engine.running


@pytest.mark.slow
async def test_its_end_is_noticed_even_if_a_child_keeps_its_stderr_open(
    start_fake: StartFake,
) -> None:
    engine = start_fake(
        "import subprocess\nsubprocess.Popen(['sleep', '4'], stdout=-3); sys.exit(4)"
    )
    with pytest.raises(WorkerDied, match="exit code 4"):
        await asyncio.wait_for(engine.ask("status"), 3)


async def test_the_process_computes_on_the_projects_device(start_fake: StartFake) -> None:
    process.prefer("cuda:1", "params.yaml")
    program = """
import os
for line in sys.stdin:
    say(json.dumps({"id": json.loads(line)["id"], "event": "done", "device": os.environ.get("LORA_DEVICE")}))
"""
    assert (await ask_with_timeout(start_fake(program)))["device"] == "cuda:1"


async def test_an_answer_without_a_request_is_ignored(start_fake: StartFake) -> None:
    engine = start_fake(
        """say('{"id": 99, "event": "done"}'); say('{"id": 1, "event": "done", "x": 5}'); time.sleep(99)"""
    )
    assert await ask_with_timeout(engine) == {"id": 1, "event": "done", "x": 5}


async def test_out_of_memory_fails_all_pending_requests_with_its_message(
    start_fake: StartFake,
) -> None:
    engine = start_fake(
        """sys.stdin.readline(); sys.stdin.readline()
say('{"id": 1, "event": "error", "kind": "memory", "message": "the memory ran out; load fewer"}'); sys.exit(3)"""
    )
    answers = await asyncio.gather(
        engine.ask("status"), engine.ask("status"), return_exceptions=True
    )
    expected = (
        "The inference process ended: the memory ran out; load fewer. Prompt again to start a new "
        "one."
    )
    assert [str(answer) for answer in answers] == [expected] * 2
    assert all(isinstance(answer, WorkerDied) for answer in answers)


async def test_a_command_that_does_not_exist_raises_engine_died(tmp_path: Path) -> None:
    for engine in (Inference(ROOT, ("/nowhere/python",)), Inference(tmp_path / "gone")):
        with pytest.raises(WorkerDied, match=r"cannot be started: No such file or directory"):
            await ask_with_timeout(engine)
        await engine.stop()


@pytest.mark.slow
async def test_a_request_that_is_too_long_is_rejected_before_it_is_sent(engine: Inference) -> None:
    with pytest.raises(
        UserError,
        match=r"The request has 1,\d{3},\d{3} bytes; the limit is 1,048,576. Shorten the text",
    ):
        await ask_with_timeout(engine, "top_k", models=[], k=1, text="x" * 2**20)
    assert (await ask_with_timeout(engine, "top_k", models=[], k=1, text="x" * (2**20 - 200)))[
        "answers"
    ] == {}


DEAF = 'import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay(\'{"id": 1, "event": "done"}\')\n'


@pytest.mark.parametrize(
    "program",
    ["time.sleep(99)", "while True: pass", 'while True: say(\'{"id": 7, "event": "x"}\')'],
)
async def test_stop_ends_a_process_that_ignores_signals_and_fails_pending_requests(
    start_fake: StartFake, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_worker, "PATIENCE", 0.1)
    engine = start_fake(DEAF + program)
    assert (await ask_with_timeout(engine))["id"] == 1
    pid, waiting = engine.pid, asyncio.create_task(engine.ask("status"))
    await asyncio.sleep(0)
    start = time.monotonic()
    await asyncio.gather(engine.stop(), engine.stop())
    assert time.monotonic() - start < 4
    with pytest.raises(WorkerDied, match="it was stopped"):
        await waiting
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_stop_while_it_starts_leaves_no_process(start_fake: StartFake) -> None:
    engine = start_fake("time.sleep(99)")
    waiting = asyncio.create_task(engine.ask("status"))
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(WorkerDied):
        await asyncio.wait_for(waiting, 9)
    assert not engine.running


@pytest.mark.slow
async def test_stop_in_the_middle_of_a_generation_is_prompt(
    engine: Inference, endless: Path
) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG)) as answers:
        await anext(answers)
        start = time.monotonic()
        await engine.stop()
        assert time.monotonic() - start < async_worker.PATIENCE
    await engine.stop()
