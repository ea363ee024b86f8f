"""The adapters screen: browse models, prompt them, and compare their answers."""

import asyncio
import threading
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Resize, ScreenResume
from textual.widget import Widget
from textual.widgets import Input, Static

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from tui.dialogs import PathScreen
from tui.screens.models.answers import Answers
from tui.screens.models.conversation import LOADING, Conversation, transcript
from tui.screens.models.dialogs import AttentionScreen
from tui.screens.models.models import Details, ModelDetails, ModelTable
from tui.screens.base import WIDE, WorkbenchScreen
from tui.services.engine_client import EngineDied
from tui.services.loaded_models import MAX_LOADED, Latest, shared_models
from tui.services.model_library import Entry, Stamp, read_documents
from tui.widgets.prompting import STEP, EngineBar, PromptInput, Slider
from tui.widgets.sampling import SamplingScreen

SEARCHING = "looking for models…"
NO_MODELS = "no models yet: press 1 then r, or type `make repro`\n\no looks in another folder"
FOLDER_QUESTION = "Search which folder for models? A folder that was added before is removed."
SAVE_QUESTION = "Save the transcript to which file? .jsonl gives JSON lines, any other suffix Markdown."
MAX_PROMPTS = 200  # in the saved history
EVERY = 1.0  # seconds between checks for changed files
BATCH = 0.1  # seconds for which verdicts are collected before a redraw
STATUS_EVERY = 2.0  # seconds between status requests
FRAME = 0.05  # seconds between redraws of a streaming answer, at least
BROWSING = {"select", "filter", "sort", "reverse", "usual", "folder"}  # actions on the table
PROMPTING = {"strength", "sampling", "attention", "copy", "save"}  # actions on the answers


class AdaptersScreen(WorkbenchScreen):
    """Table and prompt side by side; below 110 columns one of the two. The table follows the files."""

    NAME: ClassVar[str] = "adapters"
    CSS_PATH = "adapters.tcss"
    AUTO_FOCUS = "ModelTable"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "select", "Select", id="adapters.select"),
        Binding("slash", "filter", "Filter", id="adapters.filter", key_display="/"),
        Binding("s", "sort", "Sort", id="adapters.sort"),
        Binding("S", "reverse", "Sort the other way", id="adapters.reverse", show=False),
        Binding("u", "usual", "Usual", id="adapters.usual"),
        Binding("o", "folder", "Folder", id="adapters.folder"),
        Binding("v", "verify", "Check all again", id="adapters.verify", show=False),
        Binding("p", "prompt", "Prompt", id="adapters.prompt"),
        Binding("b", "browse", "Models", id="adapters.browse", show=False),
        Binding("left_square_bracket", "strength(-1)", "Strength", id="adapters.weaker", key_display="[ ]"),
        Binding("right_square_bracket", "strength(1)", "Stronger", id="adapters.stronger", show=False),
        Binding("t", "sampling", "Sampling", id="adapters.sampling"),
        Binding("a", "attention", "Attention", id="adapters.attention"),
        Binding("y", "copy", "Copy", id="adapters.copy"),
        Binding("w", "save", "Save", id="adapters.save"),
        Binding("m", "spectrum", "Measure the spectrum", id="adapters.spectrum", show=False),
        Binding("x", "interrupt", "Interrupt", id="adapters.interrupt", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.add_class("-none", "-browse")
        models = shared_models(self.workbench)
        self.library, self.engine = models.library, models.inference
        self.conversation = Conversation(models)
        self.entries: list[Entry] = []
        self.selected: list[Path] = []
        self.details: Details | None = None
        self._stop = threading.Event()  # stops the scan
        self._verdicts: dict[Path, Entry] = {}  # not drawn yet
        self._probe = Latest(self._probe_once)
        self._spectra: dict[Stamp, Any] = {}
        # Widgets are attributes, because messages and answers can arrive while the screen closes and queries fail.
        self.table, self.model_details = ModelTable(), ModelDetails()
        self.nothing = Static(SEARCHING, id="none", markup=False)
        self.prompt, self.slider, self.answers, self.bar = PromptInput(), Slider(), Answers(), EngineBar()
        self.sampling = Static(id="sampling", markup=False)

    def body(self) -> Iterable[Widget]:
        field = Input(placeholder="only models with … (Escape: all)", id="filter", compact=True)
        yield Vertical(field, self.nothing, self.table, id="models")
        prompt = Vertical(self.prompt, self.slider, self.sampling, self.answers, id="prompt")
        yield Horizontal(self.model_details, prompt, id="below")
        yield self.bar

    def on_mount(self) -> None:
        self._watcher = self.set_interval(EVERY, self._watch)
        self._status_timer = self.set_interval(STATUS_EVERY, self._tick)
        for folder in self._folders():
            if not folder.is_dir():
                self.warn(f"{folder} is not a folder, so it is not searched for models.")
        self.prompt.remember(self.workbench.state.prompts)
        self._show_sampling()

    def on_unmount(self) -> None:
        self._stop.set()

    # views and focus

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        narrow, prompting = self.app.size.width < WIDE, self.has_class("-prompt")
        if action == "interrupt":
            return self._is_generating()
        if action == "browse":
            return prompting
        if narrow and action in (BROWSING if prompting else PROMPTING):
            return False
        return super().check_action(action, parameters)

    def on_resize(self, _: Resize) -> None:
        self.refresh_bindings()

    def _switch_view(self, name: str) -> None:
        self.set_class(name == "-browse", "-browse")
        self.set_class(name == "-prompt", "-prompt")
        self.refresh_bindings()

    def action_prompt(self) -> None:
        self._switch_view("-prompt")
        self.give_focus(self.prompt)

    def action_browse(self) -> None:
        self._switch_view("-browse")
        self.give_focus(self.table)

    def action_leave(self) -> None:
        """Escape: interrupt the answer, else leave the prompt or the filter, else go back to the table."""
        field = self.query_one("#filter", Input)
        if self._is_generating():
            self.action_interrupt()
        elif self.prompt.has_focus:
            self.give_focus(self.answers)
        elif field.has_class("-open"):
            field.remove_class("-open")
            field.value = ""
            self.give_focus(self.table)
        else:
            self.action_browse()

    # the list of models

    def _folders(self) -> list[Path]:
        """The folders that the user added, in the config and here."""
        names = [*self.workbench.config.folders, *self.workbench.state.folders]
        return list(dict.fromkeys(self.workbench.root / Path(name).expanduser() for name in names))

    @on(ScreenResume)
    def _start_scan(self) -> None:
        """Find and check all models in a thread; a scan that still runs stops and reports nothing more."""
        self.library.folders = [*self.library.artifacts, *self._folders()]
        self._stop.set()
        self._stop = stop = threading.Event()

        def scan() -> None:
            entries: list[Entry] = []
            for entry in self.library.scan():
                if stop.is_set():
                    return
                entries.append(entry)
            if not stop.is_set():
                self.call_later(self._show_scan, entries)
            for entry in self.library.check_all(entries):
                if stop.is_set():
                    return
                self.call_later(self._collect_verdict, entry)

        # A daemon, not a worker of Textual's: quitting must not wait until gigabytes are hashed.
        threading.Thread(target=scan, daemon=True).start()

    @work(exclusive=True, group="watch")
    async def _watch(self) -> None:
        if self.is_current and await asyncio.to_thread(self.library.changed):
            self._start_scan()

    def _show_scan(self, entries: list[Entry]) -> None:
        """Show what a scan found; entries that are not checked yet have no verdict."""
        paths = {entry.model.path for entry in entries}
        for gone in [path for path in self.selected if path not in paths]:
            self.selected.remove(gone)
            self.warn(f"{self.library.label(gone)} is gone, and no longer selected.")
        self.entries = entries
        self._verdicts.clear()  # of an earlier scan; the valid ones are in these entries
        self.set_class(not self.entries, "-none")
        self.nothing.update(NO_MODELS)
        self.table.show(self.entries, self.selected)
        self.show_details()

    def _collect_verdict(self, entry: Entry) -> None:
        """Collect verdicts: those of small models arrive faster than the table is drawn, which would block keys."""
        if not self._verdicts:
            self.set_timer(BATCH, self._show_verdicts)
        self._verdicts[entry.model.path] = entry

    def _show_verdicts(self) -> None:
        verdicts, self._verdicts = self._verdicts, {}
        self.entries = [verdicts.get(entry.model.path, entry) for entry in self.entries]
        self.table.show(self.entries, self.selected)
        if self.details and (entry := verdicts.get(self.details.entry.model.path)):
            self.details.entry = entry
            self.model_details.show(self.details)

    def selected_entries(self) -> list[Entry]:
        """The selected models in display order, or the one under the cursor."""
        paths: set[Path | None] = {*self.selected} or {self.table.path}
        return sorted((e for e in self.entries if e.model.path in paths), key=lambda entry: entry.sort_key)

    def _select(self, paths: Sequence[Path]) -> None:
        self.selected = list(paths)
        self.table.show(self.entries, self.selected)
        self._update_slider()

    def _update_slider(self) -> None:
        self.slider.disabled = not any(entry.model.scales for entry in self.selected_entries())

    @on(ModelTable.RowHighlighted)
    def show_details(self) -> None:
        """Show the details of the model under the cursor."""
        entry = self.table.pointed
        if entry is None:
            self.details = None
            self.model_details.show(None)
        elif self.details is None or self.details.entry != entry:
            self._read(entry)
        self._update_slider()

    @work(exclusive=True, group="details")
    async def _read(self, entry: Entry) -> None:
        manifest, config = await asyncio.to_thread(read_documents, entry.model.path)
        newest = next((other for other in self.entries if other.model.path == entry.model.path), entry)
        self.details = Details(newest, manifest, config)
        self.model_details.show(self.details)
        if entry.model.scales and self.engine.running and not self._is_generating():
            self._measure_spectrum(self.details)

    @on(ModelTable.Marked)
    def toggle_marked(self, event: ModelTable.Marked) -> None:
        self._toggle(event.path)

    def action_select(self) -> None:
        if path := self.table.path:
            self._toggle(path)

    def _toggle(self, path: Path) -> None:
        if path in self.selected:
            self._select([other for other in self.selected if other != path])
        elif len(self.selected) < MAX_LOADED:
            self._select([*self.selected, path])
        else:
            self.warn(f"At most {MAX_LOADED} models are compared side by side. Deselect one first.")

    def action_usual(self) -> None:
        """Select the pipeline's models; if they are selected, deselect them."""
        variants = self.library.project_variants()
        usual = [entry.model.path for entry in self.entries if entry.model.path in variants]
        if not usual:
            self.warn(f"The pipeline has made no model yet. {NO_MODELS.splitlines()[0]}")
        self._select([] if self.selected == usual else usual)

    def action_sort(self) -> None:
        self.table.sort_next()

    def action_reverse(self) -> None:
        self.table.reverse()

    def action_filter(self) -> None:
        self.give_focus(self.query_one("#filter").add_class("-open"))

    @on(Input.Changed, "#filter")
    def filter_table(self, event: Input.Changed) -> None:
        self.table.filter(event.value)
        self.show_details()  # another model may have come to the cursor's row

    @on(Input.Submitted, "#filter")
    def back_to_table(self) -> None:
        self.give_focus(self.table)

    def action_verify(self) -> None:
        self.library.forget()
        self._start_scan()
        self.workbench.log_message("All models are being checked again.")

    @work
    async def action_folder(self) -> None:
        """Add a folder to search, also in later sessions; a folder that was added before is removed."""
        name = await self.app.push_screen_wait(PathScreen(FOLDER_QUESTION))
        if name is None:
            return
        folders, folder = self.workbench.state.folders, self.workbench.root / Path(name).expanduser()
        if str(folder) in folders:
            folders.remove(str(folder))
        elif folder.is_dir():
            folders.append(str(folder))
        else:
            self.workbench.log_message(f"{folder} is not a folder. Enter the folder that contains the models.", "error")
            return
        self.workbench.remember()
        self._start_scan()

    # prompting

    @on(Input.Submitted, "PromptInput")
    def submit(self, event: Input.Submitted) -> None:
        prompt, state = event.value.strip(), self.workbench.state
        if not prompt:
            self.warn("The prompt is empty. Enter at least one word.")
        elif not self.selected_entries():
            self.warn("No model is selected. Press b and select one.")
        else:
            state.prompts = [*(other for other in state.prompts if other != prompt), prompt][-MAX_PROMPTS:]
            self.prompt.remember(state.prompts)
            self.workbench.remember()
            self.give_focus(self.answers)
            self._prompt_models(prompt)

    @work(exclusive=True, group="ask")
    async def _prompt_models(self, prompt: str) -> None:
        self._set_engine_state("busy" if self.engine.running else "starting")
        earlier = list(self.conversation.exchanges)
        exchange = self.conversation.begin(prompt, self.selected_entries(), self.slider.value)
        await self.answers.start(exchange, earlier)
        try:
            async with aclosing(self.conversation.answers(exchange)) as changes:
                drawn_at = 0.0
                async for _ in changes:
                    loading = any(answer.ended == LOADING for answer in exchange.answers)
                    if loading or monotonic() - drawn_at >= FRAME:  # a load yields nothing until it is done
                        self._set_engine_state("loading" if loading else "busy")
                        self.answers.show(exchange)
                        drawn_at = monotonic()
                    await asyncio.sleep(0)  # tokens may arrive faster than they are drawn: let keys through
        except UserError as error:
            self._show_error(error)
        else:
            self._set_engine_state("ready")
            self._status()
            if self.conversation.chat and not exchange.chat:
                self.warn("Not all of these models have a chat template, so they were prompted without it.")
        finally:
            self.answers.show(exchange)
            self.call_later(self.refresh_bindings)

    def _show_error(self, error: UserError) -> None:
        self._set_engine_state("died" if isinstance(error, EngineDied) else "ready")
        self.workbench.fail(error)

    def _is_generating(self) -> bool:
        return any(worker.group == "ask" and worker.is_running for worker in self.workers)

    def action_interrupt(self) -> None:
        self.workers.cancel_group(self, "ask")
        self._set_engine_state("ready" if self.engine.running else "not started")

    # strength, sampling, attention

    @on(Slider.Changed)
    def move(self) -> None:
        if self.engine.running and self.conversation.newest:
            self.run_worker(self._probe.run(), group="probe")

    async def _probe_once(self) -> None:
        try:
            self.answers.show_table(await self.conversation.probe(self.slider.value))
        except UserError as error:
            self._show_error(error)

    def action_strength(self, steps: int) -> None:
        if not self.slider.disabled:
            self.slider.value += steps * STEP
        elif any(entry.model.kind == "adapter" for entry in self.selected_entries()):
            self.warn(
                "Strength scales weight changes; prefix and prompt tuning change no weights. Select another adapter."
            )
        else:
            self.warn("Strength scales an adapter's change. Select an adapter.")

    def _show_sampling(self) -> None:
        chat = " · chat template" if self.conversation.chat else ""
        self.sampling.update(f"{self.conversation.sampling}{chat}")

    @work
    async def action_sampling(self) -> None:
        has_chat = self.conversation.models.has_chat(self.selected_entries())
        settings = await self.app.push_screen_wait(
            SamplingScreen(self.conversation.sampling, self.conversation.chat, has_chat)
        )
        if settings:
            self.conversation.sampling, self.conversation.chat = settings
            self._show_sampling()

    def action_attention(self) -> None:
        entries, exchange = self.selected_entries(), self.conversation.newest
        if not entries or exchange is None:
            self.warn("Attention is shown for a prompt. Enter one first.")
            return
        pointed = self.table.pointed
        entry = pointed if pointed in entries else entries[0]
        ask = partial(self.conversation.attention, entry, exchange.prompt, self.slider.value, exchange.chat)
        self.app.push_screen(AttentionScreen(entry.label, ask))

    # copy and save

    def action_copy(self) -> None:
        if self.conversation.newest is None:
            self.warn("There is no answer to copy yet.")
        else:
            self.app.copy_to_clipboard(self.conversation.newest.answers_text())
            self.workbench.log_message("Copied the last answer to the clipboard.")

    @work
    async def action_save(self) -> None:
        if not self.conversation.exchanges:
            self.warn("There is nothing to save yet.")
            return
        name = await self.app.push_screen_wait(PathScreen(SAVE_QUESTION, "transcript.md"))
        if name is None:
            return
        path = self.workbench.root / Path(name).expanduser()
        with self.workbench.errors_shown():
            write_file(path, transcript(self.conversation.exchanges, path.suffix), durable=True)
            self.workbench.log_message(f"Saved {len(self.conversation.exchanges)} prompts to {path}.")

    # engine status and spectra

    def _set_engine_state(self, state: str) -> None:
        if state != self.bar.state:  # else the footer would be built anew at every status request
            self.bar.state = state
            self.refresh_bindings()

    def _tick(self) -> None:
        if not self.is_current or self._is_generating():
            return
        if self.engine.running:
            self._status()
        elif self.bar.state in ("ready", "busy"):
            self._set_engine_state("died")

    @work(exclusive=True, group="status")
    async def _status(self) -> None:
        if not self.engine.running:  # it ended before this worker began, and asking would start a new one
            self._set_engine_state("died")
            return
        try:
            self.bar.facts = await self.engine.ask("status")
        except UserError:
            self._set_engine_state("died")
        else:
            if not self._is_generating():
                self._set_engine_state("ready")

    def action_spectrum(self) -> None:
        if self.details and self.details.entry.model.scales:
            self._measure_spectrum(self.details)

    @work(exclusive=True, group="spectrum")
    async def _measure_spectrum(self, details: Details) -> None:
        stamp = await asyncio.to_thread(self.library.stamp, details.entry.model)
        details.spectrum = self._spectra.get(stamp, "measuring…")
        self._show_spectrum(details)
        if stamp in self._spectra:
            return
        try:
            answer = await self.engine.ask("spectrum", adapter=str(details.entry.model.path))
            details.spectrum = self._spectra[stamp] = answer["modules"]
        except UserError as error:
            details.spectrum = f"✗ {error}"
        self._show_spectrum(details)

    def _show_spectrum(self, details: Details) -> None:
        if details is self.details:
            self.model_details.show(details)
