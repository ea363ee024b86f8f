"""The half of the adapters screen that finds models: table, filter, folders, details, selection."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import ScreenResume, ScreenSuspend
from textual.message import Message
from textual.widgets import Input, Static

from pipeline.adapters.config import CONFIG
from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST
from pipeline.project.params.sections import Params
from pipeline.project.stage_graph import Project
from pipeline.workbench import GRAPH, open_project
from tui.dialogs.path import PathScreen
from tui.screens.adapters.session.catalog import Entry, Library, documents
from tui.screens.adapters.session.request_queue import MOST
from tui.screens.adapters.session.scanner import Scanner
from tui.screens.adapters.widgets.model_details import Details, ModelDetails
from tui.screens.adapters.widgets.model_table import ModelTable
from tui.screens.base import WorkbenchScreen

LOOKING = "looking for models…"
NONE = "no models yet: press 1 then r, or type `make repro`\n\no looks in another folder"
WHICH = "Look for models in which folder? One that was added before is taken away."
EVERY = 1.0  # seconds between looks at whether files changed
GATHER = 0.1  # seconds for which verdicts are gathered before they are drawn


class Found(Message):
    """All models, those not checked before without a verdict."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.entries = entries


class Checked(Message):
    """One model's verdict."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry = entry


class BrowseScreen(WorkbenchScreen):
    """Keeps the list of models as the files are, and which of them are selected."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "select", "Select", id="adapters.select"),
        Binding("slash", "filter", "Filter", id="adapters.filter", key_display="/"),
        Binding("s", "sort", "Sort", id="adapters.sort"),
        Binding("S", "reverse", "Sort the other way", id="adapters.reverse", show=False),
        Binding("u", "usual", "Usual", id="adapters.usual"),
        Binding("o", "folder", "Folder", id="adapters.folder"),
        Binding("v", "verify", "Check all again", id="adapters.verify", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.add_class("-none")
        self.library = Library(_project(self.workbench.params_path))
        self.scanner = Scanner(
            self.library, lambda found: self.post_message(Found(found)), lambda one: self.post_message(Checked(one))
        )
        self.table, self.model_details = ModelTable(), ModelDetails()  # kept: messages come while the screen closes
        self.nothing = Static(LOOKING, id="none", markup=False)
        self.entries: list[Entry] = []
        self._verdicts: dict[Path, Entry] = {}  # those that are not drawn yet
        self.selected: list[Path] = []
        self.details: Details | None = None

    def models(self) -> Vertical:
        """The table with its filter, or what to do where there is nothing to show."""
        field = Input(placeholder="only models with … (Escape: all)", id="filter", compact=True)
        return Vertical(field, self.nothing, self.table, id="models")

    def on_mount(self) -> None:
        self._watcher = self.set_interval(EVERY, self._watch, pause=True)
        for folder in self._folders():
            if not folder.is_dir():
                self.workbench.log_message(f"{folder} is not a folder; no models are looked for in it.", "warning")

    @on(ScreenResume)
    def look(self) -> None:
        self.library.folders[1:] = self._folders()
        self.scanner.start()
        self._watcher.resume()

    @on(ScreenSuspend)
    def rest(self) -> None:
        self._watcher.pause()

    def on_unmount(self) -> None:
        self.scanner.stop()

    def _folders(self) -> list[Path]:
        """Those that the user named: in the config, and here."""
        named = [*self.workbench.config.folders, *self.workbench.state.folders]
        return list(dict.fromkeys(self.workbench.root / Path(name).expanduser() for name in named))

    @work(exclusive=True, group="watch")
    async def _watch(self) -> None:
        if await asyncio.to_thread(self.library.changed):
            self.scanner.start()

    @on(Found)
    def list_found(self, event: Found) -> None:
        here = [entry.model.path for entry in event.entries]
        for gone in [path for path in self.selected if path not in here]:
            self.selected.remove(gone)
            self.workbench.log_message(f"{self.library.label(gone)} is gone, and no longer selected.", "warning")
        self.entries = list(event.entries)
        self._verdicts.clear()  # of an earlier scan; those that still hold are in these entries
        self.set_class(not self.entries, "-none")
        self.nothing.update(NONE)
        self.redraw()
        self._describe()

    @on(Checked)
    def note_verdict(self, event: Checked) -> None:
        """Verdicts of small models come faster than the table can be drawn, and keys must come through."""
        if not self._verdicts:
            self.set_timer(GATHER, self._show_verdicts)
        self._verdicts[event.entry.model.path] = event.entry

    def _show_verdicts(self) -> None:
        verdicts, self._verdicts = self._verdicts, {}
        self.entries = [verdicts.get(entry.model.path, entry) for entry in self.entries]
        self.redraw()
        if self.details and (entry := verdicts.get(self.details.entry.model.path)):
            self.details.entry = entry
            self.model_details.show(self.details)

    def redraw(self) -> None:
        """Show the table as entries and selection are."""
        self.table.show(self.entries, self.selected)

    def entry(self, path: Path | None) -> Entry | None:
        return next((entry for entry in self.entries if entry.model.path == path), None)

    def chosen(self) -> list[Entry]:
        """The selected models in the order in which they stand side by side, or the one under the cursor."""
        paths: set[Path | None] = {*self.selected} or {self.table.pointed}
        return sorted((e for e in self.entries if e.model.path in paths), key=lambda entry: entry.place)

    def selection_changed(self) -> None:
        """Another model would be asked now."""

    @on(ModelTable.Pointed)
    def _describe(self) -> None:
        entry = self.entry(self.table.pointed)
        if entry is None:
            self.details = None
            self.model_details.show(None)
        elif self.details is None or self.details.entry != entry:
            self._read(entry)
        self.selection_changed()

    @work(exclusive=True, group="details")
    async def _read(self, entry: Entry) -> None:
        found = await asyncio.to_thread(documents, entry.model.path)
        self.details = Details(self.entry(entry.model.path) or entry, found[MANIFEST], found[CONFIG])
        self.model_details.show(self.details)
        self.details_read(self.details)

    def details_read(self, details: Details) -> None:
        """The details pane shows another model."""

    @on(ModelTable.Marked)
    def _mark(self, event: ModelTable.Marked) -> None:
        self._toggle(event.path)

    def action_select(self) -> None:
        if path := self.table.pointed:
            self._toggle(path)

    def _toggle(self, path: Path) -> None:
        if path in self.selected:
            self.selected.remove(path)
        elif len(self.selected) < MOST:
            self.selected.append(path)
        else:
            self.workbench.log_message(f"{MOST} models at most are asked side by side. Take one away first.", "warning")
        self.redraw()
        self.selection_changed()

    def action_usual(self) -> None:
        """The pipeline's models, or none if they were selected."""
        usual = [entry.model.path for entry in self.entries if entry.model.path in self.library.project_variants()]
        if not usual:
            self.workbench.log_message(f"The pipeline has made no model yet. {NONE.splitlines()[0]}", "warning")
        self.selected = [] if self.selected == usual else usual
        self.redraw()
        self.selection_changed()

    def action_sort(self) -> None:
        self.table.sort_next()

    def action_reverse(self) -> None:
        self.table.reverse()

    def action_filter(self) -> None:
        self.give_focus(self.query_one("#filter").add_class("-open"))

    @on(Input.Changed, "#filter")
    def filter_table(self, event: Input.Changed) -> None:
        self.table.filter(event.value)

    @on(Input.Submitted, "#filter")
    def back_to_table(self) -> None:
        self.give_focus(self.table)

    def clear_filter(self) -> bool:
        """Show all models again; False if they were."""
        field = self.query_one("#filter", Input)
        if not field.has_class("-open"):
            return False
        field.remove_class("-open")
        field.value = ""
        self.give_focus(self.table)
        return True

    def action_verify(self) -> None:
        self.library.forget()
        self.scanner.start()
        self.workbench.log_message("All models are checked again.")

    @work
    async def action_folder(self) -> None:
        """Look in another folder too, now and the next time; named again, it is looked in no more."""
        named = await self.app.push_screen_wait(PathScreen(WHICH))
        if named is None:
            return
        state, folder = self.workbench.state, self.workbench.root / Path(named).expanduser()
        if str(folder) in state.folders:
            state.folders.remove(str(folder))
        elif folder.is_dir():
            state.folders.append(str(folder))
        else:
            self.workbench.log_message(f"{folder} is not a folder. Give the folder that holds the models.", "error")
            return
        self.workbench.remember()
        self.look()


def _project(params: Path) -> Project:
    """The project of a params file, with the default settings where that cannot be read: the models are there."""
    try:
        return open_project(params)
    except (UserError, OSError):
        return Project(params.parent, Params(), GRAPH)
