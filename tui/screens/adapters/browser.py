"""The browsing half of the adapters screen: table, filter, folders, details, selection."""

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
from tui.dialogs import PathScreen
from tui.screens.adapters.session.catalog import Entry, Library, read_documents
from tui.screens.adapters.session.request_queue import MAX_LOADED
from tui.screens.adapters.session.scanner import Scanner
from tui.screens.adapters.widgets.model_details import Details, ModelDetails
from tui.screens.adapters.widgets.model_table import ModelTable
from tui.screens.base import WorkbenchScreen

SEARCHING = "looking for models…"
NO_MODELS = "no models yet: press 1 then r, or type `make repro`\n\no looks in another folder"
FOLDER_QUESTION = "Search which folder for models? A folder that was added before is removed."
EVERY = 1.0  # seconds between checks for changed files
BATCH = 0.1  # seconds for which verdicts are collected before a redraw


class Scanned(Message):
    """A scan found these models; those not checked yet have no verdict."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.entries = entries


class Checked(Message):
    """A model was checked."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry = entry


class BrowseScreen(WorkbenchScreen):
    """Keeps the list of models in step with the files, and the selection."""

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
        self.library = Library(_open_project(self.workbench.params_path))
        self.scanner = Scanner(
            self.library,
            lambda entries: self.post_message(Scanned(entries)),
            lambda entry: self.post_message(Checked(entry)),
        )
        self.table, self.model_details = ModelTable(), ModelDetails()  # messages arrive while the screen closes
        self.nothing = Static(SEARCHING, id="none", markup=False)
        self.entries: list[Entry] = []
        self._verdicts: dict[Path, Entry] = {}  # not drawn yet
        self.selected: list[Path] = []
        self.details: Details | None = None

    def models(self) -> Vertical:
        """The filter and the table, or a hint if there are no models."""
        field = Input(placeholder="only models with … (Escape: all)", id="filter", compact=True)
        return Vertical(field, self.nothing, self.table, id="models")

    def on_mount(self) -> None:
        self._watcher = self.set_interval(EVERY, self._watch, pause=True)
        for folder in self._folders():
            if not folder.is_dir():
                self.workbench.log_message(f"{folder} is not a folder, so it is not searched for models.", "warning")

    @on(ScreenResume)
    def start_watching(self) -> None:
        self.library.folders[1:] = self._folders()
        self.scanner.start()
        self._watcher.resume()

    @on(ScreenSuspend)
    def stop_watching(self) -> None:
        self._watcher.pause()

    def on_unmount(self) -> None:
        self.scanner.stop()

    def _folders(self) -> list[Path]:
        """The folders that the user added, in the config and here."""
        names = [*self.workbench.config.folders, *self.workbench.state.folders]
        return list(dict.fromkeys(self.workbench.root / Path(name).expanduser() for name in names))

    @work(exclusive=True, group="watch")
    async def _watch(self) -> None:
        if await asyncio.to_thread(self.library.changed):
            self.scanner.start()

    @on(Scanned)
    def show_scan(self, event: Scanned) -> None:
        paths = [entry.model.path for entry in event.entries]
        for gone in [path for path in self.selected if path not in paths]:
            self.selected.remove(gone)
            self.workbench.log_message(f"{self.library.label(gone)} is gone, and no longer selected.", "warning")
        self.entries = list(event.entries)
        self._verdicts.clear()  # of an earlier scan; the valid ones are in these entries
        self.set_class(not self.entries, "-none")
        self.nothing.update(NO_MODELS)
        self.redraw()
        self._show_details()

    @on(Checked)
    def collect_verdict(self, event: Checked) -> None:
        """Collect verdicts: those of small models arrive faster than the table is drawn, which would block keys."""
        if not self._verdicts:
            self.set_timer(BATCH, self._show_verdicts)
        self._verdicts[event.entry.model.path] = event.entry

    def _show_verdicts(self) -> None:
        verdicts, self._verdicts = self._verdicts, {}
        self.entries = [verdicts.get(entry.model.path, entry) for entry in self.entries]
        self.redraw()
        if self.details and (entry := verdicts.get(self.details.entry.model.path)):
            self.details.entry = entry
            self.model_details.show(self.details)

    def redraw(self) -> None:
        """Redraw the table from the entries and the selection."""
        self.table.show(self.entries, self.selected)

    def entry(self, path: Path | None) -> Entry | None:
        return next((entry for entry in self.entries if entry.model.path == path), None)

    def selected_entries(self) -> list[Entry]:
        """The selected models in display order, or the one under the cursor."""
        paths: set[Path | None] = {*self.selected} or {self.table.pointed}
        return sorted((e for e in self.entries if e.model.path in paths), key=lambda entry: entry.sort_key)

    def selection_changed(self) -> None:
        """Called when the selection or the cursor changed."""

    @on(ModelTable.Pointed)
    def _show_details(self) -> None:
        entry = self.entry(self.table.pointed)
        if entry is None:
            self.details = None
            self.model_details.show(None)
        elif self.details is None or self.details.entry != entry:
            self._read(entry)
        self.selection_changed()

    @work(exclusive=True, group="details")
    async def _read(self, entry: Entry) -> None:
        documents = await asyncio.to_thread(read_documents, entry.model.path)
        self.details = Details(self.entry(entry.model.path) or entry, documents[MANIFEST], documents[CONFIG])
        self.model_details.show(self.details)
        self.details_read(self.details)

    def details_read(self, details: Details) -> None:
        """Called when the details pane shows another model."""

    @on(ModelTable.Marked)
    def _toggle_marked(self, event: ModelTable.Marked) -> None:
        self._toggle(event.path)

    def action_select(self) -> None:
        if path := self.table.pointed:
            self._toggle(path)

    def _toggle(self, path: Path) -> None:
        if path in self.selected:
            self.selected.remove(path)
        elif len(self.selected) < MAX_LOADED:
            self.selected.append(path)
        else:
            self.workbench.log_message(
                f"At most {MAX_LOADED} models are compared side by side. Deselect one first.", "warning"
            )
        self.redraw()
        self.selection_changed()

    def action_usual(self) -> None:
        """Select the pipeline's models; if they are selected, deselect them."""
        pipeline_models = [
            entry.model.path for entry in self.entries if entry.model.path in self.library.project_variants()
        ]
        if not pipeline_models:
            self.workbench.log_message(f"The pipeline has made no model yet. {NO_MODELS.splitlines()[0]}", "warning")
        self.selected = [] if self.selected == pipeline_models else pipeline_models
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
        """Remove the filter. Returns False if there was none."""
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
        self.workbench.log_message("All models are being checked again.")

    @work
    async def action_folder(self) -> None:
        """Add a folder to search, also in later sessions; a folder that was added before is removed."""
        name = await self.app.push_screen_wait(PathScreen(FOLDER_QUESTION))
        if name is None:
            return
        state, folder = self.workbench.state, self.workbench.root / Path(name).expanduser()
        if str(folder) in state.folders:
            state.folders.remove(str(folder))
        elif folder.is_dir():
            state.folders.append(str(folder))
        else:
            self.workbench.log_message(f"{folder} is not a folder. Enter the folder that contains the models.", "error")
            return
        self.workbench.remember()
        self.start_watching()


def _open_project(params: Path) -> Project:
    """The project of a params file, with default settings if it is invalid, so that its models are listed anyway."""
    try:
        return open_project(params)
    except (UserError, OSError):
        return Project(params.parent, Params(), GRAPH)
