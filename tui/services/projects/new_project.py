"""`lora new` in a process of its own: choosing settings imports torch, opens the base and tries a
few steps.
"""

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.worker import python_module

ERROR = "error: "
MAX_LINE = 2**20  # bytes of a line of its output


async def create(arguments: Sequence[str], folder: Path, on_note: Callable[[str], None]) -> str:
    """Run `lora new ARGUMENTS` in `folder`, and return what it printed.

    `on_note` gets each line that says what it is doing. Raises UserError with the command's own
    message. Cancelled, it stops the command.
    """
    process = await asyncio.create_subprocess_exec(
        *python_module("cli.main", "new", *arguments),
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "96"},
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        limit=MAX_LINE,
        start_new_session=True,
    )
    assert process.stdout and process.stderr
    notes = ["no message"]
    try:
        with suppress(ValueError):  # a line without an end
            async for line in process.stderr:
                notes.append(line.decode(errors="replace").strip())
                on_note(notes[-1])
        printed = await process.stdout.read()
        code = await process.wait()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        errors = [note for note in notes if note.startswith(ERROR)]
        raise UserError([*notes[-1:], *errors][-1].removeprefix(ERROR))
    return printed.decode(errors="replace")
