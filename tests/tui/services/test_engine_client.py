"""The client of the inference process: with the real one, and with ones that misbehave."""

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
from tests.helpers.projects import ROOT
from tui.services import engine_client
from tui.services.engine_client import EngineDied, Inference

PATIENCE = 60
LONG = {"model": "endless", "text": "w1", "limit": 16_000}
Answer = dict[str, Any]


@pytest.fixture
async def engine() -> AsyncIterator[Inference]:
    engine = Inference(ROOT)
    yield engine
    await engine.stop()


Odd = Callable[[str], Inference]


@pytest.fixture
async def odd() -> AsyncIterator[Odd]:
    """Start a Python program in the place of the real process; `say` writes a line."""
    started = list[Inference]()

    def start(program: str) -> Inference:
        say = "import sys, time, os, json\ndef say(line): sys.stdout.write(line + '\\n'); sys.stdout.flush()\n"
        started.append(Inference(ROOT, (sys.executable, "-c", say + program)))
        return started[-1]

    yield start
    for one in started:
        await one.stop()


async def asked(engine: Inference, do: str = "status", **fields: object) -> Answer:
    """The answer, or a failure instead of a wait without end."""
    return await asyncio.wait_for(engine.ask(do, **fields), PATIENCE)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def load(engine: Inference, folder: Path) -> None:
    await asked(engine, "load", name="endless", base=folder)


async def test_the_first_request_starts_it_and_the_next_finds_what_was_loaded(engine: Inference, endless: Path) -> None:
    assert (engine.running, engine.pid) == (False, None)
    await load(engine, endless)
    first = engine.pid
    status = await asked(engine)
    assert (status["event"], status["loaded"], status["pid"]) == ("done", ["endless"], first)
    assert engine.running
    await engine.stop()
    assert (engine.running, engine.pid) == (False, None)


async def test_it_can_be_started_before_it_is_asked(engine: Inference) -> None:
    await engine.warm()
    pid = engine.pid
    assert pid is not None
    assert (await asked(engine))["pid"] == pid


async def test_a_folder_called_pipeline_in_the_project_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/__init__.py").write_text("raise SystemExit('theirs')", encoding="utf-8")
    engine = Inference(tmp_path)
    assert (await asked(engine))["event"] == "done"
    await engine.stop()


async def test_a_refusal_is_raised_with_its_reason_and_the_process_goes_on(engine: Inference) -> None:
    with pytest.raises(UserError, match=r"nothing is not loaded. Loaded: nothing\.") as refused:
        await asked(engine, "unload", name="nothing")
    assert not isinstance(refused.value, EngineDied)
    assert engine.running


async def test_tokens_stream_and_the_last_event_says_why_it_ended(engine: Inference, endless: Path) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG | {"limit": 5})) as answers:
        heard = [answer async for answer in answers]
    assert [answer["event"] for answer in heard] == ["token"] * 5 + ["done"]
    assert (heard[-1]["reason"], heard[-1]["tokens"]) == ("length", 5)


async def test_closing_a_stream_interrupts_it_and_the_next_request_is_answered_at_once(
    engine: Inference, endless: Path
) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG)) as answers:
        async for answer in answers:
            assert answer["event"] == "token"
            break
    start = time.monotonic()
    await asked(engine, "unload", name="endless")  # waits in the queue behind the generation
    assert time.monotonic() - start < 1


async def test_a_generation_that_is_cancelled_by_its_id_ends_with_cancelled(engine: Inference, endless: Path) -> None:
    await load(engine, endless)
    heard = list[Answer]()
    async with aclosing(engine.stream("generate", **LONG)) as answers:
        async for answer in answers:
            heard.append(answer)
            if len(heard) == 3:
                await asked(engine, "cancel", target=answer["id"])
    assert heard[-1]["event"] == "cancelled"
    assert len(heard) < 16_000


async def test_a_task_that_is_cancelled_while_it_waits_frees_the_process(engine: Inference, endless: Path) -> None:
    await load(engine, endless)
    task = asyncio.create_task(engine.ask("generate", **LONG))
    await asked(engine)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asked(engine, "unload", name="endless")


async def test_a_slow_reader_holds_the_process_up_and_loses_nothing(engine: Inference, endless: Path) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG | {"limit": 600})) as answers:
        heard = [await anext(answers)]
        await until(lambda: held_up(engine))
        assert (await asked(engine))["loaded"] == ["endless"], "another request comes through"
        heard += [answer async for answer in answers]
    assert [answer["event"] for answer in heard] == ["token"] * 600 + ["done"]


def held_up(engine: Inference) -> bool:
    """Whether as many answers wait in the client as may."""
    assert engine._process is not None
    (request,) = engine._process._waiting.values()
    assert len(request.answers) <= engine_client.GATHERED
    return len(request.answers) == engine_client.GATHERED


@pytest.mark.parametrize(
    ("sign", "why"),
    [(signal.SIGKILL, "it was killed, perhaps because the machine's memory ran out"), (15, "signal 15 (Terminated)")],
)
async def test_killed_in_the_middle_all_that_wait_are_told_and_the_next_request_starts_afresh(
    engine: Inference, endless: Path, sign: int, why: str
) -> None:
    await load(engine, endless)
    first = engine.pid
    assert first is not None
    with pytest.raises(EngineDied) as told:
        async with aclosing(engine.stream("generate", **LONG)) as answers:
            await anext(answers)
            waiting = [asyncio.create_task(asked(engine, "unload", name="endless")) for _ in range(3)]
            await asked(engine)  # sent after them
            os.kill(first, sign)
            async for _ in answers:
                pass
    assert why in str(told.value)
    assert str(told.value).endswith(". Prompt again: a fresh one starts.")
    assert [str(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [str(told.value)] * 3
    assert not engine.running
    status = await asked(engine)
    assert status["loaded"] == []
    assert status["pid"] == engine.pid != first


DEATHS = {
    "import nowhere": "exit code 1, its last line was \"ModuleNotFoundError: No module named 'nowhere'\"",
    "sys.exit(5)": "exit code 5.",
    "os.write(2, b'x' * 10**7 + b'\\nlast \\xff\\n\\n'); sys.exit(2)": "exit code 2, its last line was 'last \ufffd'",
    "os.abort()": "signal 6 (Aborted)",
    "os.kill(os.getpid(), 35)": "signal 35 (",
    "os.close(1); time.sleep(99)": "it was killed",
    'os.write(1, b\'{"id": 1, "event"\'); sys.exit(3)': "exit code 3",
    'os.write(1, b\'{"id": 1, "event"\'); os.close(1); time.sleep(99)': "it was killed",
    "say('hello'); time.sleep(99)": "it wrote a line that is no answer (hello)",
    "os.write(1, b'\\xff\\n'); time.sleep(99)": "it wrote a line that is no answer (\ufffd)",
    "say('[' * 99999); time.sleep(99)": "it wrote a line that is no answer ([[[[",
    "say('[]'); time.sleep(99)": "it wrote a line that is no answer ([])",
    'say(\'{"event": "done"}\'); time.sleep(99)': "it wrote a line that is no answer ({",
    'say(\'{"id": [], "event": "done"}\'); time.sleep(99)': "it wrote a line that is no answer ({",
    'say(\'{"id": 1, "event": 7}\'); time.sleep(99)': "it wrote a line that is no answer ({",
    "say('x' * 40_000_000); time.sleep(99)": "it wrote a line that is no answer (",
}


@pytest.mark.parametrize(("program", "why"), DEATHS.items(), ids=range(len(DEATHS)))
async def test_a_process_that_dies_or_writes_nonsense_is_ended_and_all_are_told_why(
    odd: Odd, program: str, why: str
) -> None:
    engine = odd(program)
    answers = await asyncio.wait_for(
        asyncio.gather(*(engine.ask("status") for _ in range(3)), return_exceptions=True), 9
    )
    for answer in answers:
        assert isinstance(answer, EngineDied)
        assert f"The inference process ended: {why}" in str(answer)
    assert not engine.running


async def test_what_it_started_may_hold_its_stderr_and_still_its_end_is_noticed(odd: Odd) -> None:
    engine = odd("import subprocess\nsubprocess.Popen(['sleep', '4'], stdout=-3); sys.exit(4)")
    with pytest.raises(EngineDied, match="exit code 4"):
        await asyncio.wait_for(engine.ask("status"), 3)


async def test_an_answer_to_nobody_is_passed_over(odd: Odd) -> None:
    engine = odd("""say('{"id": 99, "event": "done"}'); say('{"id": 1, "event": "done", "x": 5}'); time.sleep(99)""")
    assert await asked(engine) == {"id": 1, "event": "done", "x": 5}


async def test_without_memory_all_that_wait_are_told_what_to_lower(odd: Odd) -> None:
    engine = odd(
        """sys.stdin.readline(); sys.stdin.readline()
say('{"id": 1, "event": "error", "kind": "memory", "message": "the memory ran out; load fewer"}'); sys.exit(3)"""
    )
    answers = await asyncio.gather(engine.ask("status"), engine.ask("status"), return_exceptions=True)
    expected = "The inference process ended: the memory ran out; load fewer. Prompt again: a fresh one starts."
    assert [str(answer) for answer in answers] == [expected] * 2
    assert all(isinstance(answer, EngineDied) for answer in answers)


async def test_a_command_that_is_not_there_is_an_engine_that_died(tmp_path: Path) -> None:
    for engine in (Inference(ROOT, ("/nowhere/python",)), Inference(tmp_path / "gone")):
        with pytest.raises(EngineDied, match=r"cannot be started: No such file or directory"):
            await asked(engine)
        await engine.stop()


async def test_a_request_that_is_too_long_is_refused_before_it_is_sent(engine: Inference) -> None:
    with pytest.raises(UserError, match=r"The request has 1,\d{3},\d{3} bytes, more than 1,048,576. Shorten the text"):
        await asked(engine, "top_k", models=[], k=1, text="x" * 2**20)
    assert (await asked(engine, "top_k", models=[], k=1, text="x" * (2**20 - 200)))["answers"] == {}


DEAF = 'import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay(\'{"id": 1, "event": "done"}\')\n'


@pytest.mark.parametrize(
    "program", ["time.sleep(99)", "while True: pass", 'while True: say(\'{"id": 7, "event": "x"}\')']
)
async def test_stop_ends_one_that_listens_to_nothing_and_tells_those_that_wait(
    odd: Odd, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "PATIENCE", 0.1)
    engine = odd(DEAF + program)
    assert (await asked(engine))["id"] == 1
    pid, waiting = engine.pid, asyncio.create_task(engine.ask("status"))
    await asyncio.sleep(0)
    start = time.monotonic()
    await asyncio.gather(engine.stop(), engine.stop())
    assert time.monotonic() - start < 4
    with pytest.raises(EngineDied, match="it was stopped"):
        await waiting
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_stop_while_it_starts_leaves_no_process(odd: Odd) -> None:
    engine = odd("time.sleep(99)")
    waiting = asyncio.create_task(engine.ask("status"))
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(EngineDied):
        await asyncio.wait_for(waiting, 9)
    assert not engine.running


async def test_stop_in_the_middle_of_a_generation_is_prompt(engine: Inference, endless: Path) -> None:
    await load(engine, endless)
    async with aclosing(engine.stream("generate", **LONG)) as answers:
        await anext(answers)
        start = time.monotonic()
        await engine.stop()
        assert time.monotonic() - start < engine_client.PATIENCE
    await engine.stop()
