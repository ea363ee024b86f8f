"""The screen of models: which there are, what they keep and learned, and a prompt to several side
by side.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import Input

from pipeline.errors import UserError
from pipeline.files.home import expand
from pipeline.inference.requests import MAX_LOADED
from pipeline.views.model_library import Entry, read_documents
from tui.dialogs import Menu, PathScreen, Reader
from tui.screens.base import WIDE, WorkbenchScreen
from tui.screens.models.columns import BY_LABEL
from tui.screens.models.details import Details, format_fields
from tui.screens.models.panes import DetailsPane, ModelsPane
from tui.screens.models.prompt_pane import PromptPane
from tui.screens.models.table import ModelTable, sort_choices
from tui.services.evaluation import Evaluation
from tui.services.loaded_models import shared_models
from tui.services.vocabulary import vocabulary
from tui.shipping import ship
from tui.widgets.prompting import STEP

FOLDER_QUESTION = "Search which folder for models? A folder that was added before is removed."
SAVE_QUESTION = (
    "Save the transcript to which file? .jsonl gives JSON lines, any other suffix Markdown."
)
MAX_PROMPTS = 200  # in the saved history
# times as long as a look at all files takes there is none: thousands must not keep a core busy
IDLE_SHARE = 300
# seconds for which verdicts are collected before the list is drawn: never one redraw a verdict
BATCH = 0.25
STATUS_EVERY = 2.0  # seconds between status requests
FRAME = 0.05  # seconds between redraws of a streaming answer, at least


class ModelsScreen(WorkbenchScreen):
    """List and prompt side by side; below 110 columns one of the two. The list follows the
    files.
    """

    NAME: ClassVar[str] = "models"
    CSS_PATH = "models.tcss"
    HELP = (
        "Which models there are, what each **keeps** of the base's answers and **learned** of the "
        "new sentences, and how it answers beside others. The pipeline's own come first, then "
        "folders, which Enter unfolds.\n"
        "\n"
        "Space chooses the models that a prompt goes to, Enter goes to the prompt. `E` evaluates "
        "adapters that the pipeline does not, such as a sweep's."
    )
    AUTO_FOCUS = "ModelTable"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "chat", "chat", id="models.chat"),
        Binding(
            "left_square_bracket", "strength(-1)", "strength", id="models.weaker", key_display="[ ]"
        ),
        Binding(
            "right_square_bracket", "strength(1)", "stronger", id="models.stronger", show=False
        ),
        Binding("a", "attention", "attention", id="models.attention"),
        Binding("t", "sampling", "sampling", id="models.sampling"),
        Binding("ctrl+r", "again", "ask again", id="models.again"),
        Binding("y", "copy", "copy the answer", id="models.copy"),
        Binding("ctrl+s", "save", "save all answers", id="models.save"),
        Binding("v", "verify", "check all files again", id="models.verify", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.add_class("-browse")
        models = shared_models(self.workbench)
        self.library, self.engine = models.library, models.inference
        self.evaluation = Evaluation(self.workbench.params_path)
        self.entries: list[Entry] = []
        self.chosen: list[Path] = []
        self.details: Details | None = None
        self._wanted: Path | None = None  # to be pointed at once it is listed
        self._stop = threading.Event()  # stops the scan
        # not shown yet; None: the scan is done
        self._checked: deque[list[Entry] | Entry | None] = deque()
        self._visible: Sequence[Path] = ()  # checked first
        self._is_stale = False  # a file may have changed since the files were last looked at
        self._next_look = 0.0  # when they may be looked at again
        # Widgets are attributes, because messages and answers can arrive while the screen closes
        # and queries fail.
        self.list_pane, self.details_pane, self.prompt_pane = (
            ModelsPane(),
            DetailsPane(),
            PromptPane(models),
        )
        self.table, self.prompt = self.list_pane.table, self.prompt_pane.prompt
        self.slider = self.prompt_pane.slider

    def body(self) -> Iterable[Widget]:
        yield Horizontal(
            Vertical(self.list_pane, self.details_pane, id="models"), self.prompt_pane, id="body"
        )

    def on_mount(self) -> None:
        for folder in self._folders():
            if not folder.is_dir():
                self.warn(f"{folder} is not a folder, so it is not searched for models.")
        self.prompt.remember(self.workbench.state.prompts)
        self._start_scan()

    def on_unmount(self) -> None:
        self._stop.set()
        self.evaluation.stop()

    # What the app and other screens ask

    def open_with(self, select: Path | str | None = None, prompt: str = "", **_: Any) -> None:
        """Point at the model in a folder; put a text into the prompt."""
        if select is not None:
            self._wanted = self.workbench.root / select
            self.action_browse()
            self._point_at_wanted()
        if prompt:
            self.prompt.value = prompt
            self.action_prompt()

    def unsaved(self) -> str:
        count = len(self.prompt_pane.conversation.exchanges) - self.prompt_pane.saved
        return f"{count} prompts and their answers" if count > 1 else ""

    def project_changed(self) -> None:
        if (
            project := self.workbench.project_watch.project
        ) and project is not self.library.project:
            self.library.project = project  # other variants: their names and groups change
            self._start_scan()

    # Views and focus

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "leave" and (
            self.prompt_pane.is_generating()
            or self.focused_pane is self.prompt_pane
            or self.list_pane.filter_text
        ):
            return True
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

    @on(ModelTable.Opened)
    def _ask_opened(self) -> None:
        self.action_prompt()

    def action_leave(self) -> None:
        """Escape: interrupt the answer, else leave the field, the enlarged pane, then the prompt
        for the list.
        """
        if self.prompt_pane.is_generating():
            self.prompt_pane.interrupt()
        elif self.focused is self.prompt and self.app.size.width < WIDE:
            self.give_focus(self.prompt_pane.answers)  # the list would cover them
        elif self.focused_pane is self.prompt_pane and self.maximized is None:
            self.action_browse()
        elif self.table.has_focus and self.list_pane.filter_text:
            self.list_pane.close_filter()  # it was kept with Enter
        else:
            super().action_leave()

    # The list of models

    def _folders(self) -> list[Path]:
        """The folders that the user added, in the config and here."""
        names = [*self.workbench.config.folders, *self.workbench.state.folders]
        return list(dict.fromkeys(self.workbench.root / expand(name) for name in names))

    def _start_scan(self) -> None:
        """Find and check all models in a thread; a scan that still runs stops and reports nothing
        more.
        """
        self.library.folders = [*self.library.artifacts, *self._folders()]
        self._stop.set()
        self._stop = stop = threading.Event()
        checked: deque[list[Entry] | Entry | None] = deque()
        self._checked = checked
        self.follow_files()

        def add(found: Entry | None) -> None:
            was_empty = not checked
            checked.append(found)
            if was_empty:
                self.call_later(lambda: self.set_timer(BATCH, self._show_checked))

        def scan() -> None:
            entries: list[Entry] = []
            for entry in self.library.scan():
                if stop.is_set():
                    return
                entries.append(entry)
            checked.append(entries)
            self.call_later(self._show_checked)
            for entry in self.library.check_all(entries, lambda: self._visible):
                if stop.is_set():
                    return
                add(entry)
            add(None)

        # A daemon, not a worker of Textual's: quitting must not wait until gigabytes are hashed.
        threading.Thread(target=scan, daemon=True).start()

    def watched(self) -> Iterable[Path]:
        return self.library.folders

    def files_changed(self) -> None:
        self._is_stale = True
        self._look()

    def tick(self) -> None:
        if self._is_stale:
            self._look()
        self.prompt_pane.tick()

    @work(exclusive=True, group="look")
    async def _look(self) -> None:
        """Find the models anew if their files changed."""
        if not self.is_current:
            return
        self._is_stale = False
        changed, started = await asyncio.to_thread(self.library.added), monotonic()
        if not changed and started < self._next_look:
            self._is_stale = True  # the clock asks again
            return
        if not changed:
            changed = await asyncio.to_thread(self.library.changed)
            self._next_look = monotonic() + IDLE_SHARE * (monotonic() - started)
        if changed:
            self._start_scan()

    def _show_scan(self, entries: list[Entry]) -> None:
        """Show what a scan found; entries that are not checked yet have no verdict."""
        paths = {entry.model.path for entry in entries}
        for gone in [path for path in self.chosen if path not in paths]:
            self.chosen.remove(gone)
            self.warn(f"{self.library.label(gone)} is gone, and no longer chosen.")
        self.entries = entries
        self.list_pane.show(self.entries, self.chosen)
        self._visible = self.table.visible_paths()
        self._point_at_wanted()
        self.show_details()
        if entries and not self.engine.running:
            self.prompt_pane.start_engine()

    def _show_checked(self) -> None:
        """Show what was found and checked since the last call: verdicts of small models arrive
        faster than the list is drawn."""
        fresh: dict[Path, Entry] = {}
        while self._checked:
            found = self._checked.popleft()
            if found is None:
                self._is_stale = True  # a file may have changed while all were read
            elif isinstance(found, Entry):
                fresh[found.model.path] = found
            else:
                self._show_scan(found)
        if not fresh:
            return
        self.entries = [fresh.get(entry.model.path, entry) for entry in self.entries]
        self.list_pane.show(self.entries)
        self._visible = self.table.visible_paths()
        if self.details and (entry := fresh.get(self.details.entry.model.path)):
            self._read(entry)

    def _point_at_wanted(self) -> None:
        if self._wanted and self.table.point(self._wanted):
            self._wanted = None

    def chosen_entries(self) -> list[Entry]:
        """The chosen models in display order, or the one under the cursor."""
        if not self.chosen:
            return [self.library.read(entry) for entry in [self.table.pointed] if entry]
        chosen = sorted(
            (e for e in self.entries if e.model.path in self.chosen), key=attrgetter("sort_key")
        )
        return [self.library.read(entry) for entry in chosen]

    def _choose(self, paths: Sequence[Path]) -> None:
        self.chosen = list(paths)
        self.list_pane.show(self.entries, self.chosen)
        self._update_prompt()

    @work(exclusive=True, group="words")
    async def _update_prompt(self) -> None:
        """The strength that can be set, and the words that are marked, are those of the chosen
        models.
        """
        entries = self.chosen_entries()
        self.slider.disabled = not any(entry.model.scales for entry in entries)
        adapters = [entry.label for entry in entries if entry.model.kind == "adapter"]
        self.slider.why = f"{adapters[0]} changes no weights" if adapters else "no adapter chosen"
        self.prompt_pane.show_models([entry.label for entry in entries])
        bases = await asyncio.to_thread(
            lambda: [self.library.base(entry.model) for entry in entries]
        )
        words = await asyncio.to_thread(lambda: [vocabulary(base) for base in bases if base])
        labels = [entry.label for entry, base in zip(entries, bases, strict=True) if base]
        self.prompt_pane.know(
            {label: known for label, known in zip(labels, words, strict=True) if known is not None}
        )

    @on(ModelTable.Pointed)
    def show_details(self) -> None:
        """Show the details of the model under the cursor."""
        entry = self.table.pointed
        self._visible = self.table.visible_paths()
        if entry is None:
            self.workers.cancel_group(self, "details")
            self.details = None
            self.details_pane.show_folder(self.table.pointed_entries)
        elif self.details is None or self.details.entry != entry:
            self._read(entry)
        if not self.chosen:
            self._update_prompt()

    @work(exclusive=True, group="details")
    async def _read(self, entry: Entry) -> None:
        entry, documents = await asyncio.to_thread(
            lambda: (self.library.read(entry), read_documents(entry.model.path))
        )
        checked = (
            other
            for other in self.entries
            if other.model.path == entry.model.path and other.verdict
        )
        entry = next(checked, entry)
        spectrum = (
            await asyncio.to_thread(self._kept_spectrum, entry) if entry.model.scales else None
        )
        self.details = Details(entry, *documents, spectrum)
        self.details_pane.show(self.details)

    @on(ModelTable.Chosen)
    def toggle_chosen(self, event: ModelTable.Chosen) -> None:
        """Choose models, or none of them any more if all were."""
        more = [path for path in event.paths if path not in self.chosen]
        if not more:
            self._choose([path for path in self.chosen if path not in event.paths])
            return
        if len(self.chosen) + len(more) > MAX_LOADED:
            self.warn(
                f"At most {MAX_LOADED} models are compared side by side. Take one away with Space "
                "first."
            )
        self._choose([*self.chosen, *more][:MAX_LOADED])

    def action_pipeline(self) -> None:
        """Choose the pipeline's models; if they are chosen, none."""
        variants = self.library.project_variants()
        own = [entry.model.path for entry in self.entries if entry.model.path in variants]
        if not own:
            self.warn("The pipeline has made no model yet. R runs it.")
        self._choose([] if self.chosen == own[:MAX_LOADED] else own[:MAX_LOADED])

    @work
    async def action_sort(self) -> None:
        current = self.table.sort_column
        choices = sort_choices(current, self.table.reverse)
        label = await self.app.push_screen_wait(
            Menu("Sort by", choices, current.label if current else "kept")
        )
        if label is not None:
            self.table.sort(BY_LABEL.get(label))

    def action_sort_beside(self, by: int) -> None:
        self.table.sort_beside(by)

    def action_verify(self) -> None:
        self.library.forget()
        self._start_scan()
        self.workbench.log_message("All models are being checked again.")

    @work
    async def action_folder(self) -> None:
        """Add a folder to search, also in later sessions; a folder that was added before is
        removed.
        """
        name = await self.app.push_screen_wait(PathScreen(FOLDER_QUESTION))
        if name is None:
            return
        folders, folder = self.workbench.state.folders, self.workbench.root / expand(name)
        with self.workbench.errors_shown():  # a name may be too long for any file
            if str(folder) in folders:
                folders.remove(str(folder))
            elif folder.is_dir():
                folders.append(str(folder))
            else:
                raise UserError(
                    f"{folder} is not a folder. Enter the folder that contains the models."
                )
            self.workbench.remember()
            self._start_scan()

    # What is asked of the model under the cursor

    def action_chat(self) -> None:
        """Chat with the chosen models, or the one under the cursor."""
        if entries := self.chosen_entries():
            self.workbench.go("chat", models=[entry.model.path for entry in entries])
        else:
            self.warn("No model is chosen. Move to one, or choose some with Space.")

    @work
    async def action_ship(self) -> None:
        """Export the adapter under the cursor for another program."""
        entry = self.table.pointed
        if entry and entry.model.kind == "adapter":
            await ship(self.workbench, entry.label, entry.model.path)
        else:
            self.warn("Only adapters are exported. Move to one; a merged model is used as it is.")

    @work
    async def action_fields(self) -> None:
        if entry := self.table.pointed:
            manifest, config = await asyncio.to_thread(read_documents, entry.model.path)
            fields = format_fields(Details(self.library.read(entry), manifest, config))
            self.app.push_screen(Reader(fields, title=entry.label))

    @work(group="evaluate")
    async def action_evaluate(self) -> None:
        """Evaluate the adapters that are chosen, or under the cursor: of a folder, those that were
        not yet.
        """
        chosen = [
            entry for entry in self.entries if entry.model.path in self.chosen
        ] or self.table.pointed_entries
        adapters = [entry for entry in chosen if entry.model.kind == "adapter" and entry.group]
        if len(chosen) > 1:
            adapters = [
                entry for entry in adapters if entry.verdict is None or entry.verdict.kept is None
            ]
        if not adapters:
            self.warn(
                "There is no adapter to evaluate here: the pipeline evaluates its own models (R), "
                "and what was evaluated stays. Move to another adapter, or to a folder."
            )
            return
        paths = [entry.model.path for entry in adapters]
        self.list_pane.show(self.entries, busy=paths)
        try:
            problems = await self.evaluation.run(paths)
        except UserError as error:
            self.workbench.fail(error)
        else:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            done = f"Evaluated {adapters[0].label}{more}."
            self.workbench.log_message(problems or done, "warning" if problems else "information")
        self.list_pane.show(self.entries, busy=self.evaluation.adapters)
        self._start_scan()

    # The prompt

    @on(Input.Submitted, "PromptInput")
    def submit(self, event: Input.Submitted) -> None:
        prompt, state = event.value.strip(), self.workbench.state
        if not prompt:
            self.warn("The prompt is empty. Enter at least one word.")
        elif not self.chosen_entries():
            self.warn("No model is chosen. Press Esc, and choose one with Space.")
        else:
            state.prompts = [*(other for other in state.prompts if other != prompt), prompt][
                -MAX_PROMPTS:
            ]
            self.prompt.remember(state.prompts)
            self.workbench.remember()
            self.prompt_pane.ask(prompt, self.chosen_entries())

    def action_again(self) -> None:
        """Ask the chosen models the newest prompt again, at the strength that is set now."""
        if (newest := self.prompt_pane.conversation.newest) and (entries := self.chosen_entries()):
            self.prompt_pane.ask(newest.prompt, entries)
        else:
            self.warn("There is no prompt to ask again yet.")

    def action_strength(self, steps: int) -> None:
        if not self.slider.disabled:
            self.slider.value += steps * STEP
        elif any(entry.model.kind == "adapter" for entry in self.chosen_entries()):
            self.warn(
                "Strength scales weight changes; prefix and prompt tuning change no weights. "
                "Choose another adapter."
            )
        else:
            self.warn("Strength scales an adapter's change. Choose an adapter.")

    def action_sampling(self) -> None:
        self.prompt_pane.edit_sampling(self.chosen_entries())

    def action_attention(self) -> None:
        self.prompt_pane.show_attention(self.chosen_entries(), self.table.pointed)

    def action_copy(self) -> None:
        self.prompt_pane.copy_answer()

    def action_save(self) -> None:
        self.prompt_pane.save()

    # The spectrum of ΔW

    def action_spectrum(self) -> None:
        if self.details and self.details.entry.model.scales:
            self._measure_spectrum(self.details)
        else:
            self.warn("Only an adapter that changes weights has a spectrum. Move to a LoRA.")

    def _kept_spectrum(self, entry: Entry) -> Any:
        """The spectrum that was measured of these files before, if it was."""
        key = self.library.key("spectrum", entry.model.path)
        facts = self.library.cache.get(key, self.library.stamp(entry.model))
        return facts["modules"] if facts else None

    @work(exclusive=True, group="spectrum")
    async def _measure_spectrum(self, details: Details) -> None:
        details.spectrum = (
            await asyncio.to_thread(self._kept_spectrum, details.entry) or "measuring…"
        )
        self._show_spectrum(details)
        if details.spectrum != "measuring…":
            return
        stamp = await asyncio.to_thread(self.library.stamp, details.entry.model)
        try:
            answer = await self.engine.ask("spectrum", adapter=str(details.entry.model.path))
            details.spectrum = answer["modules"]
            key = self.library.key("spectrum", details.entry.model.path)
            self.library.cache.put(key, stamp, {"modules": answer["modules"]}, ())
            await asyncio.to_thread(self.library.cache.save)
        except UserError as error:
            details.spectrum = f"✗ {error}"
        self._show_spectrum(details)

    def _show_spectrum(self, details: Details) -> None:
        if details is self.details:
            self.details_pane.show(details)
