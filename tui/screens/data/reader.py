"""The process that reads data files, `pipeline.data.browse_server`, asked about one at a time."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from textual.widget import Widget

from pipeline.errors import UserError
from pipeline.files.async_worker import AsyncWorker
from pipeline.files.worker import python_module
from pipeline.project.process import environment
from pipeline.views.data_files import DataFile, flat
from pipeline.views.data_rows import Answer

COMMAND = python_module("pipeline.data.browse_server")
NAME, ADVICE = "The process that reads data files", "Open the file again (o)."


class Reader:
    """`file`: what is asked about. Its process is started by the first request."""

    def __init__(self, root: Path) -> None:
        self.process = AsyncWorker(COMMAND, root, NAME, ADVICE, environment)
        self.file = DataFile("")

    async def draft(self, file: DataFile, line: str) -> Answer:
        """How a line would be read from a file."""
        return await self.process.ask("draft", **file.request(), line=line)

    def ask(
        self,
        widget: Widget,
        do: str,
        take: Callable[[Answer], None],
        refuse: Callable[[str], None],
        rest: float = 0.0,
        **fields: Any,
    ) -> None:
        """Ask after a rest, in place of what the widget asked so before. `take` gets each answer,
        `refuse` the reason if there is none, unless another file is shown by then.
        """
        file = self.file

        async def read() -> None:
            await asyncio.sleep(rest)
            try:
                async with aclosing(self.process.stream(do, **file.request(), **fields)) as answers:
                    async for answer in answers:
                        if file is not self.file:
                            return
                        take(answer)
            except UserError as error:
                refuse(flat(str(error)))

        start: Any = read  # called by the worker: it may be cancelled before
        if file.name:
            widget.run_worker(start, group=do, exclusive=True)
