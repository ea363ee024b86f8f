"""The pane of the line under the cursor: it reads a model's files, and measures its spectrum."""

import asyncio

from textual import work

from pipeline.views.model_library import Entry
from tui.app import Workbench
from tui.dialogs import Reader
from tui.panes.pane import Pane
from tui.panes.text import Text
from tui.screens.conversation.session import sign_of
from tui.screens.models.about import DETAILS
from tui.screens.models.columns import Folder, Line
from tui.screens.models.details import (
    SPECTRUM,
    Details,
    detail_lines,
    fields,
    folder_lines,
    read_details,
)
from tui.services.loaded_models import LoadedModels


class DetailsPane(Pane):
    """`details` are None on a folder, and until they are read."""

    def __init__(self, workbench: Workbench, models: LoadedModels) -> None:
        self.text = Text()
        super().__init__(DETAILS, self.text, id="model")
        self._workbench, self._models = workbench, models
        self.details: Details | None = None

    def show_line(self, line: Line) -> None:
        if isinstance(line, Folder):
            self.workers.cancel_group(self, "details")
            self.details = None
            self.show_title(title=line.label)
            self.text.show(lambda _: folder_lines(line), again=True)
        else:
            self._read(line)

    @work(exclusive=True, group="details")
    async def _read(self, entry: Entry) -> None:
        details = await asyncio.to_thread(read_details, self._models.library, entry)
        self.details = details
        self.show_title(title=f"{sign_of(details.entry)[0]} {entry.label}")
        self.text.show(lambda _: detail_lines(details), again=True)

    def show_fields(self) -> None:
        if self.details:
            self.app.push_screen(Reader(fields(self.details), self.details.entry.label))

    @work(exclusive=True, group="spectrum")
    async def measure(self) -> None:
        """Measure the spectrum, once for these files."""
        details, library = self.details, self._models.library
        if not details or not details.entry.model.scales:
            only = "Only an adapter that changes weights has a spectrum. Move to a LoRA."
            self._workbench.log_message(only, "warning")
            return
        model = details.entry.model
        self._workbench.log_message(f"Measuring the spectrum of {details.entry.label}.")
        with self._workbench.errors_shown():
            stamp = await asyncio.to_thread(library.stamp, model)
            found = await self._models.inference.ask(SPECTRUM, adapter=str(model.path))
            library.cache.put(library.key(SPECTRUM, model.path), stamp, found, ())
            await asyncio.to_thread(library.cache.save)
            if self.details:
                self._read(self.details.entry)
