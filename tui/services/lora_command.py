"""Runs a `lora` command in a process of its own, without a terminal."""

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.worker import python_module

COMMAND = python_module("cli.main")
MAX_OUTPUT = 20_000  # last bytes of what it writes


class LoraCommand:
    """One process at a time, in `folder`. It ends with the workbench, or with the worker that waits
    for it.
    """

    def __init__(self, folder: Path, command: Sequence[str] = COMMAND) -> None:
        self._folder, self._command = folder, command
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, *words: str) -> tuple[str, str]:
        """The end of its output and of its errors. Raises UserError with its error if it fails or
        is killed.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                *words,
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,  # Ctrl+C in the terminal does not reach it
            )
            output, errors = await asyncio.gather(_tail(process.stdout), _tail(process.stderr))
            code = await process.wait()
        except OSError as error:
            raise UserError(
                f"lora {words[0]} cannot be started: {error.strerror or error}."
            ) from None
        finally:
            self.stop()
            self._process = None
        if code < 0:
            raise UserError(f"lora {words[0]} was killed by {signal.Signals(-code).name}.")
        if code:
            raise UserError(*_reason(errors).splitlines())
        return output.strip(), errors.strip()

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)


async def _tail(stream: asyncio.StreamReader | None) -> str:
    text = b""
    while stream and (chunk := await stream.read(4096)):
        text = (text + chunk)[-MAX_OUTPUT:]
    return text.decode(errors="replace")


def _reason(errors: str) -> str:
    """What a command says went wrong: from its line `error: …`."""
    lines = errors.strip().splitlines() or ["it wrote no reason"]
    start = next(
        (number for number, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1
    )
    return "\n".join(lines[start : start + 4]).removeprefix("error: ")
