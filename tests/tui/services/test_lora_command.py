"""A command in a process of its own: what it says while it runs, and how it ends."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tui.services.lora_command import LoraCommand


def python(code: str, folder: Path) -> LoraCommand:
    return LoraCommand(folder, (sys.executable, "-c", code))


async def test_each_line_of_its_errors_is_a_note_and_its_output_is_returned(tmp_path: Path) -> None:
    code = "import sys; print('made'); print('one\\ntwo ', file=sys.stderr); print('it')"
    notes: list[str] = []
    told = await python(code, tmp_path).run("new", on_note=notes.append)
    assert told == ("made\nit", "one\ntwo") and notes == ["one", "two"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('a note\\nerror: it is taken. Name another.')", "it is taken. "),
        ("import sys; sys.exit(2)", "it wrote no reason"),
        ("import os; os.kill(os.getpid(), 9)", "lora new was killed by SIGKILL."),
    ],
    ids=["error", "silent", "killed"],
)
async def test_how_it_fails_is_one_message(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        await python(code, tmp_path).run("new")
    assert str(raised.value).startswith(message)


async def test_a_line_without_an_end_holds_nothing_up(tmp_path: Path) -> None:
    code = (
        "import sys; print('one', file=sys.stderr); print('x' * 2**23, file=sys.stderr); print(1)"
    )
    async with asyncio.timeout(20):
        assert await python(code, tmp_path).run("new") == ("1", "one")


async def test_a_command_that_is_not_waited_for_any_more_ends(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(60)"
    task = asyncio.create_task(python(code, tmp_path).run("new"))
    pid = tmp_path / "pid"
    async with asyncio.timeout(30):
        while not (pid.exists() and pid.read_text(encoding="utf-8").strip()):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ProcessLookupError):
            while True:
                os.kill(int(pid.read_text(encoding="utf-8")), 0)
                await asyncio.sleep(0.02)
