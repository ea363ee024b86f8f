"""The screen of models: which there are, what they keep and learned, and a prompt to several side
by side.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget

from pipeline.errors import UserError
from pipeline.files.home import expand
from pipeline.inference.requests import MAX_LOADED
from pipeline.views.model_library import Entry, read_documents
from tui.dialogs import PathScreen, Reader
from tui.panes.pane import About, Pane
from tui.panes.table import Table
from tui.panes.text import Text
from tui.screens.base import WIDE
from tui.screens.conversation.screen import STYLES, ConversationScreen
from tui.screens.models.attention import AttentionDialog
from tui.screens.models.columns import (
    KEPT,
    Folder,
    Line,
    columns,
    kept,
    key_of,
    lines_of,
    look_name,
    parent_of,
    words_of,
)
from tui.screens.models.details import Details, detail_lines, fields, folder_lines
from tui.screens.models.scan import Scan
from tui.services.evaluation import Evaluation
from tui.shipping import ship
from tui.widgets.cells import method_sign

FOLDER_QUESTION = "Search which folder for models? A folder that was added before is removed."
SEARCHING = "looking for models…"
NO_MODELS = "No models yet. R runs the pipeline, which makes some; f searches another folder."
IDLE_SHARE = 50  # times as long as a look at all files takes there is none
FEW = 8  # models of a folder that is unfolded at first
MODELS = About(
    "Models",
    """\
The pipeline's models, then a line for each folder of others. `●` is chosen, the sign and colour
before the name are those of the method's curve.

* **learned**: share of the answers to new prompts that are as expected (of long ones their
  ROUGE-L), of the new sentences that it completes, or of the chosen answers that it prefers: the
  first of these that is known; else the loss on new sentences, in nats per token, as in Results.
* **kept**: share of the base's answers to old sentences that are still the same; **forgot**: how
  much the loss on them rose, in nats per token. Of a folder: of the one that keeps most.
* **loss**: mean loss of the last epoch of training.
* **state**: `✓` the files are those that training wrote, `✗` they are not, or the model breaks a
  limit of `evaluate.limits`; `?` there is no manifest.

Sorted, all models are in one list, whatever folder they are in.""",
    [
        Binding("s", "screen.sort", "sort", id="models.sort"),
        Binding("E", "screen.evaluate", "evaluate", id="models.evaluate"),
        Binding("x", "screen.ship", "ship", id="models.ship"),
        Binding("p", "screen.pipeline", "pipeline's", id="models.pipeline"),
        Binding("f", "screen.folder", "folder", id="models.folder"),
        Binding("m", "screen.spectrum", "spectrum", id="models.spectrum", show=False),
        Binding("i", "screen.fields", "all fields", id="models.fields", show=False),
    ],
    filters="filter",
)
DETAILS = About(
    "Model",
    """\
**ΔW** is what an adapter adds to each weight matrix: the columns are its singular values, the
largest first. One high column means a change in one direction; the percentage is that direction's
share.

`m` measures it, which takes a moment, once per adapter; `i` shows all fields of its files.""",
    [
        Binding("m", "screen.spectrum", "spectrum"),
        Binding("i", "screen.fields", "all fields"),
    ],
)


class ModelsScreen(ConversationScreen):
    """List and prompt side by side; below 110 columns one of the two. The list follows the
    files.
    """

    NAME: ClassVar[str] = "models"
    CSS_PATH: ClassVar[Any] = [STYLES, "models.tcss"]
    CHATS, FEW = False, 1
    PANES: ClassVar[dict[str, About]] = {
        "models": MODELS,
        "model": DETAILS,
        **ConversationScreen.PANES,
    }
    HELP = """\
Which models there are, what each **keeps** of the base's answers and **learned** of the new
sentences, and how it answers beside others. The pipeline's own come first, then folders, which
Enter unfolds.

Space chooses the models that a prompt goes to, Enter goes to the prompt. Each prompt is asked anew:
the models read no message before it. `E` evaluates adapters that the pipeline does not, such as a
sweep's."""
    AUTO_FOCUS = "#models Table"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "chat", "chat", id="models.chat"),
        Binding("a", "attention", "attention", id="models.attention"),
        Binding("t", "settings", "Settings", id="models.sampling", show=False),
        Binding("y", "copy", "copy the answer", id="models.copy"),
        Binding("v", "verify", "check all files again", id="models.verify", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.add_class("-browse")
        self.library = self.session.models.library
        self.evaluation = Evaluation(self.workbench.params_path)
        self.entries: list[Entry] = []
        self.chosen: list[Path] = []
        self.details: Details | None = None
        self._wanted: Path | None = None  # to be pointed at once it is listed
        self._groups = set[str]()  # that were listed before
        self._is_stale, self._next_look = False, 0.0  # whether and when to look at the files
        self._scan = Scan(self.library, partial(self.call_later, self._take))
        self.table = Table[Line](
            key=key_of,
            parent=parent_of,
            words=words_of,
            nothing=SEARCHING,
            favourite=KEPT,
            columns=columns(self._is_chosen, self._is_busy, self._is_folded, self._is_flat),
        )
        self.model = Text()
        self.field.placeholder = "a prompt; Enter asks the chosen models"

    def body(self) -> Iterable[Widget]:
        yield Horizontal(
            Vertical(self.pane("models", self.table), self.pane("model", self.model), id="left"),
            Vertical(*self.conversation(), id="right"),
        )

    def on_mount(self) -> None:
        for folder in self.folders():
            if not folder.is_dir():
                self.warn(f"{folder} is not a folder, so it is not searched for models.")
        self._start_scan()

    def on_unmount(self) -> None:
        self._scan.stop()
        self.evaluation.stop()

    # What the app and other screens ask

    def open_with(self, select: Path | str | None = None, prompt: str = "", **_: Any) -> None:
        """Point at the model in a folder; put a text into the prompt."""
        if select is not None:
            self._wanted = self.workbench.root / select
            self.action_browse()
            self._point_at_wanted()
        if prompt:
            self.field.fill(prompt)
            self.action_prompt()

    def project_changed(self) -> None:
        project = self.workbench.project_watch.project
        if project and project is not self.library.project:
            self.library.project = project  # other variants: their names and groups change
            self._start_scan()

    def watched(self) -> Iterable[Path]:
        return self.library.folders

    def files_changed(self) -> None:
        self._is_stale = True
        self._look()

    def tick(self) -> None:
        super().tick()
        self._look()

    @work(exclusive=True, group="look")
    async def _look(self) -> None:
        """Scan again if a model was added, removed or changed; a run writes all the time, and
        thousands of files must not keep a core busy.
        """
        library, started = self.library, monotonic()
        if self._is_stale and started >= self._next_look:
            self._is_stale = False
            changed = await asyncio.to_thread(lambda: library.added() or library.changed())
            self._next_look = monotonic() + IDLE_SHARE * (monotonic() - started)
            if changed:
                self._start_scan()

    # Views and focus

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "leave" and not self.is_writing():
            is_inside = self.focused_pane in (self.history_pane, self.message_pane)
            if is_inside or self.table.needle:
                return True
        return super().check_action(action, parameters)

    def _switch_view(self, name: str) -> None:
        self.set_class(name == "-browse", "-browse")
        self.set_class(name == "-prompt", "-prompt")
        self.refresh_bindings()

    def action_prompt(self) -> None:
        self._switch_view("-prompt")
        self.give_focus(self.field)

    def action_browse(self) -> None:
        self._switch_view("-browse")
        self.give_focus(self.table)

    def action_leave(self) -> None:
        """Esc: leave the field, the enlarged pane, then the prompt for the list."""
        if self.focused is self.field and self.app.size.width < WIDE and self.history.last:
            self.give_focus(self.history.last)  # the list would cover the answers
        elif self.focused_pane in (self.history_pane, self.message_pane) and not self.maximized:
            self.action_browse()
        elif self.table.has_focus and self.table.needle:
            self.query_one("#models", Pane).close_filter()  # it was kept with Enter
        else:
            super().action_leave()

    # The list of models

    def _is_chosen(self, entry: Entry) -> bool:
        return entry.model.path in self.chosen

    def _is_busy(self, entry: Entry) -> bool:
        return entry.model.path in self.evaluation.adapters

    def _is_folded(self, name: str) -> bool:
        return name in self.table.folded

    def _is_flat(self) -> bool:
        return bool(self.table.sorted_by)

    def _start_scan(self) -> None:
        self.library.folders = [*self.library.artifacts, *self.folders()]
        self._scan.start()
        if self.is_current:
            self.follow_files()

    def _take(self, entries: list[Entry] | None, checked: Sequence[Entry]) -> None:
        """Show what a scan found; models without a verdict are not checked yet."""
        if entries is not None:
            self._take_all(entries)
        fresh = {entry.model.path: entry for entry in checked}
        if not fresh:
            return
        self.entries = [fresh.get(entry.model.path, entry) for entry in self.entries]
        self._show_list()
        if self.details and (entry := fresh.get(self.details.entry.model.path)):
            self._read(entry)

    def _take_all(self, entries: list[Entry]) -> None:
        paths = {entry.model.path for entry in entries}
        for gone in [path for path in self.chosen if path not in paths]:
            self.chosen.remove(gone)
            self.warn(f"{self.library.label(gone)} is gone, and no longer chosen.")
        self.entries = entries
        self.table.nothing = NO_MODELS
        self._show_list()
        self._point_at_wanted()
        self._update_prompt()
        if entries and not self.engine.running:
            self.start_engine()

    def _show_list(self) -> None:
        lines = lines_of(self.entries)
        for line in lines:
            if isinstance(line, Folder) and line.name not in self._groups:
                self._groups.add(line.name)
                self.table.folded |= {line.name} if len(line.entries) > FEW else set()
        self.table.show(lines)
        unchecked = sum(entry.verdict is None for entry in self.entries)
        facts = [f"{len(self.entries):,}", *[f"checking {unchecked:,}"] * bool(unchecked)]
        self.query_one("#models", Pane).show_title(*facts * bool(self.entries))
        self._look_first()

    def _look_first(self) -> None:
        """Models whose lines can be seen are checked first."""
        top = round(self.table.scroll_offset.y)
        lines = self.table.shown[top : top + max(self.table.page_height, 20)]
        self._scan.seen = [line.model.path for line in lines if isinstance(line, Entry)]

    def _point_at_wanted(self) -> None:
        if self._wanted and self.table.point(self._wanted):
            self._wanted = None

    def chosen_entries(self) -> list[Entry]:
        """The chosen models in display order, or the one under the cursor."""
        line = self.table.pointed
        if not self.chosen:
            return [line] if isinstance(line, Entry) else []
        chosen = [entry for entry in self.entries if entry.model.path in self.chosen]
        return sorted(chosen, key=lambda entry: entry.sort_key)

    def _choose(self, paths: Sequence[Path]) -> None:
        self.chosen = list(paths)
        self.table.refresh()
        self._update_prompt()

    @work(exclusive=True, group="use")
    async def _update_prompt(self) -> None:
        """What a prompt goes to; the words that are named are those of these models."""
        await self.use(self.chosen_entries())

    def no_models(self) -> str:
        return "No model is chosen. Press Esc, and choose one with Space."

    def empty(self) -> str:
        return "Choose models with Space, or none for the one under the cursor. Enter: the prompt."

    @on(Table.Pointed, "#models Table")
    def _line_pointed(self, event: Table.Pointed) -> None:
        """Show the details of the line under the cursor."""
        line = event.row
        self._look_first()
        if isinstance(line, Folder):
            self.workers.cancel_group(self, "details")
            self.details = None
            self.query_one("#model", Pane).show_title(title=line.name)
            self.model.show(lambda _: folder_lines(line), again=True)
        elif self.details is None or self.details.entry != line:
            self._read(line)
        if not self.chosen:
            self._update_prompt()

    @on(Table.Opened, "#models Table")
    def _line_opened(self, event: Table.Opened) -> None:
        line = event.row
        if isinstance(line, Folder):
            self.table.fold(line.name, line.name not in self.table.folded)
        else:
            self.action_prompt()

    @on(Table.Chosen, "#models Table")
    def _line_chosen(self, event: Table.Chosen) -> None:
        """Choose a model, or those of a folder; or none of them any more if all were."""
        line = event.row
        entries = line.entries if isinstance(line, Folder) else [line]
        paths = [entry.model.path for entry in entries]
        more = [path for path in paths if path not in self.chosen]
        if not more:
            self._choose([path for path in self.chosen if path not in paths])
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

    def action_sort(self) -> None:
        self.table.action_sort()

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

    @work(exclusive=True, group="details")
    async def _read(self, entry: Entry) -> None:
        def read() -> Details:
            model = self.library.read(entry)
            spectrum = self._kept_spectrum(model) if model.model.scales else None
            return Details(model, *read_documents(entry.model.path), spectrum)

        details = await asyncio.to_thread(read)
        path = details.entry.model.path
        checked = (other for other in self.entries if other.model.path == path and other.verdict)
        self._show_details(replace(details, entry=next(checked, details.entry)))

    def _show_details(self, details: Details) -> None:
        self.details = details
        sign, style = method_sign(look_name(details.entry))
        title = Content.assemble((f"{sign} ", style), details.entry.label)
        pane = self.query_one("#model", Pane)
        pane.show_title(title=details.entry.label)
        pane.border_title = title
        self.model.show(partial(detail_lines, details), again=True)

    def action_chat(self) -> None:
        """Chat with the chosen models, or the one under the cursor."""
        if entries := self.chosen_entries():
            self.workbench.go("chat", models=[entry.model.path for entry in entries])
        else:
            self.warn("No model is chosen. Move to one, or choose some with Space.")

    @work
    async def action_ship(self) -> None:
        """Export the adapter under the cursor for another program."""
        line = self.table.pointed
        if isinstance(line, Entry) and line.model.kind == "adapter":
            await ship(self.workbench, line.label, line.model.path)
        else:
            self.warn("Only adapters are exported. Move to one; a merged model is used as it is.")

    @work
    async def action_fields(self) -> None:
        line = self.table.pointed
        if isinstance(line, Entry):
            documents = await asyncio.to_thread(read_documents, line.model.path)
            text = fields(Details(self.library.read(line), *documents))
            self.app.push_screen(Reader(text, line.label))

    @work(group="evaluate")
    async def action_evaluate(self) -> None:
        """Evaluate the adapters that are chosen, or under the cursor: of a folder, those that were
        not yet.
        """
        line = self.table.pointed
        entries = [entry for entry in self.entries if entry.model.path in self.chosen]
        if not entries and line:
            entries = list(line.entries) if isinstance(line, Folder) else [line]
        adapters = [entry for entry in entries if entry.model.kind == "adapter" and entry.group]
        if len(entries) > 1:
            adapters = [entry for entry in adapters if kept(entry) is None]
        if not adapters:
            self.warn(
                "There is no adapter to evaluate here: the pipeline evaluates its own models (R), "
                "and what was evaluated stays. Move to another adapter, or to a folder."
            )
            return
        try:
            running = self.evaluation.run([entry.model.path for entry in adapters])
            self.call_later(self.table.refresh)  # it is measuring
            problems = await running
        except UserError as error:
            self.workbench.fail(error)
        else:
            more = f" and {len(adapters) - 1} more" if len(adapters) > 1 else ""
            done = f"Evaluated {adapters[0].label}{more}."
            self.workbench.log_message(problems or done, "warning" if problems else "information")
        self._start_scan()

    # The prompt

    def action_copy(self) -> None:
        """Copy the answers to the last prompt."""
        if self.history.views:
            self.history.views[-1].replied.action_copy()
        else:
            self.warn("There is no answer to copy yet.")

    def action_attention(self) -> None:
        """Attention over the last prompt: of the model under the cursor if it was asked, else of an
        adapter.
        """
        entries, turns, line = self.session.entries, self.talk.turns, self.table.pointed
        if not entries or not turns:
            self.warn("Attention is shown for a prompt. Enter one first.")
            return
        adapters = [entry for entry in entries if entry.model.kind == "adapter"]
        entry = line if isinstance(line, Entry) and line in entries else (adapters or entries)[0]
        is_adapter = entry.model.kind == "adapter"
        strength = self.session.strength if entry.model.scales else 1.0
        ask = partial(self._attention, entry, turns[-1].text)
        self.app.push_screen(AttentionDialog(entry.label, is_adapter, strength, ask))

    async def _attention(
        self, entry: Entry, text: str, strength: float, **head: int
    ) -> dict[str, Any]:
        """Weights of the head at `layer` and `head`; without them small maps of all heads."""
        await self.session.models.load(entry)
        chat = self.session.template and self.session.models.has_chat([entry])
        request: dict[str, Any] = {"model": str(entry.model.path), "text": text, "chat": chat}
        if entry.model.kind == "adapter":
            request["strength"] = strength
        return await self.engine.ask("attention" if head else "attention_maps", **request, **head)

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
        path = details.entry.model.path
        stamp = await asyncio.to_thread(self.library.stamp, details.entry.model)
        spectrum = await asyncio.to_thread(self._kept_spectrum, details.entry)
        if spectrum is None:
            self._show_details(replace(details, spectrum="measuring…"))
            try:
                answer = await self.engine.ask("spectrum", adapter=str(path))
                spectrum = answer["modules"]
                key = self.library.key("spectrum", path)
                self.library.cache.put(key, stamp, {"modules": spectrum}, ())
                await asyncio.to_thread(self.library.cache.save)
            except UserError as error:
                spectrum = f"✗ {error}"
        if self.details and self.details.entry.model.path == path:
            self._show_details(replace(self.details, spectrum=spectrum))
