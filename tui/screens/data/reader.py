"""The process that reads data files (`pipeline.data.browse_server`), asked about one file at a
time.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.async_worker import AsyncWorker
from pipeline.files.worker import Answer, python_module
from pipeline.project.process import environment
from pipeline.views.data_files import DataFile

COMMAND = python_module("pipeline.data.browse_server")
NAME, ADVICE = "The process that reads data files", "Open the file again (o)."
# requests whose answer counts whatever file is shown meanwhile
ANY_FILE = ("draft", "copy", "convert")


class Reader:
    """Starts the process with the first request. `shows(file)`: whether answers about a file are
    still wanted.
    """

    def __init__(
        self, root: Path, shows: Callable[[DataFile], bool], is_running: Callable[[], bool]
    ) -> None:
        self.process = AsyncWorker(COMMAND, root, NAME, ADVICE, environment)
        self._shows, self._is_running = shows, is_running

    async def stream(self, do: str, file: DataFile, **fields: Any) -> AsyncGenerator[Answer, None]:
        """The answers about a file, until another is shown. Raises UserError."""
        try:
            async with aclosing(self.process.stream(do, **file.request(), **fields)) as answers:
                async for answer in answers:
                    if not self._is_running() or not (do in ANY_FILE or self._shows(file)):
                        return
                    yield answer
        except UserError:
            # else the process was stopped, and there is nothing left to show it on
            if self._is_running():
                raise

    async def ask(self, do: str, file: DataFile, **fields: Any) -> Answer | None:
        """The last answer; None if another file is shown meanwhile."""
        last = None
        async with aclosing(self.stream(do, file, **fields)) as answers:
            async for answer in answers:
                last = answer
        return last if last and last["event"] == "done" else None
