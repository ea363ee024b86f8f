"""Runs a `lora` command in a process of its own, without a terminal."""

import asyncio
import os
import signal
from asyncio import StreamReader
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.worker import python_module

COMMAND = python_module("cli.main")
MAX_LINE = 2**20  # bytes of a line of its errors


class LoraCommand:
    """One process at a time, in `folder`. It ends with the workbench, or with the worker that waits
    for it.
    """

    def __init__(self, folder: Path, command: Sequence[str] = COMMAND) -> None:
        self._folder, self._command = folder, command
        self._process: asyncio.subprocess.Process | None = None

    async def run(
        self, *words: str, on_note: Callable[[str], object] = lambda _: None
    ) -> tuple[str, str]:
        """Its output and its errors; `on_note` gets each line of these while it runs.

        Raises UserError with its error if it fails or is killed.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                *words,
                cwd=self._folder,
                env={**os.environ, "NO_COLOR": "1", "COLUMNS": "96"},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                limit=MAX_LINE,
                start_new_session=True,  # Ctrl+C in the terminal does not reach it
            )
            assert process.stdout and process.stderr
            output, errors = await asyncio.gather(
                process.stdout.read(), _lines(process.stderr, on_note)
            )
            code = await process.wait()
        except OSError as error:
            raise UserError(
                f"lora {words[0]} cannot be started: {error.strerror or error}."
            ) from None
        finally:
            self.stop()
        if code < 0:
            raise UserError(f"lora {words[0]} was killed by {signal.Signals(-code).name}.")
        if code:
            raise UserError(*_reason(errors).splitlines())
        return output.decode(errors="replace").strip(), errors

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)


async def _lines(stream: StreamReader, on_note: Callable[[str], object]) -> str:
    lines = []
    try:
        async for line in stream:
            lines.append(line.decode(errors="replace").rstrip())
            on_note(lines[-1])
    except ValueError:  # a line without an end
        await stream.read()  # else the command would wait for a reader
    return "\n".join(lines)


def _reason(errors: str) -> str:
    """What a command says went wrong: four lines from its last `error: …`, else the last line."""
    _, found, reason = errors.rpartition("error: ")
    lines = reason.splitlines() or ["it wrote no reason"]
    return "\n".join(lines[:4] if found else lines[-1:])
