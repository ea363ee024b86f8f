"""Evaluates adapters in a process of its own: `lora evaluate --adapter`, whose numbers appear in artifacts/measured."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError

COMMAND = (sys.executable, "-P", "-m", "cli.main", "evaluate")  # -P: not the user's folder named `cli`
MAX_OUTPUT = 20_000  # last bytes of what it writes


class Evaluation:
    """One process at a time. It ends with the workbench: what it has measured until then is kept."""

    def __init__(self, params: Path, command: Sequence[str] = COMMAND) -> None:
        self._params, self._command = params, command
        self._process: asyncio.subprocess.Process | None = None
        self.adapters: Sequence[Path] = ()  # that are being evaluated

    @property
    def running(self) -> bool:
        return bool(self.adapters)

    async def run(self, adapters: Sequence[Path]) -> str:
        """Evaluate adapters; returns what was wrong with some of them, or "". Raises UserError if it failed."""
        if self.running:
            raise UserError(f"{len(self.adapters)} adapters are being evaluated. Wait until they are.")
        self.adapters = tuple(adapters)
        options = [word for adapter in adapters for word in ("--adapter", str(adapter))]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(*self._command, "--params", str(self._params), *options),
                cwd=self._params.parent,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl+C in the terminal does not reach it
            )
            errors = await _tail(self._process.stderr)
            code = await self._process.wait()
        except OSError as error:
            raise UserError(f"The evaluation cannot be started: {error.strerror or error}.") from None
        finally:
            self.stop()
            self.adapters, self._process = (), None
        if code:
            raise UserError(_reason(code, errors))
        return errors.strip()

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


def _reason(code: int, errors: str) -> str:
    if code < 0:
        return f"The evaluation was killed by {signal.Signals(-code).name}. Adapters that it had done are kept."
    lines = errors.strip().splitlines() or ["it wrote no reason"]
    start = next((number for number, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1)
    return "Not evaluated: " + "\n".join(lines[start : start + 4]).removeprefix("error: ")
