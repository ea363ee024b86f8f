"""The screen of models: which there are, what they keep and learned, and a prompt to several side
by side.
"""

import asyncio
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget

from pipeline.errors import UserError
from pipeline.files.home import expand
from pipeline.inference.requests import MAX_LOADED
from pipeline.views.model_library import Entry
from tui.dialogs import AskText
from tui.panes.pane import About
from tui.panes.table import Table
from tui.screens.conversation.screen import STYLES, ConversationScreen
from tui.screens.models.about import DETAILS, MODELS
from tui.screens.models.columns import Folder, ModelList, entries_of, kept
from tui.screens.models.details import DetailsPane
from tui.screens.models.scan import start_scan
from tui.services.evaluation import Evaluation
from tui.shipping import ship

FOLDER_QUESTION = "Search which folder for models? A folder that was added before is removed."
IDLE_SHARE = 50  # times as long as a look at all files takes there is none
NO_ADAPTER = (
    "There is no adapter to evaluate here: the pipeline evaluates its own models (R), and what was "
    "evaluated stays. Move to another adapter, or to a folder."
)
CHOOSE = "Space chooses models, and c chats with them: with one, or two side by side."
TOO_MANY = f"At most {MAX_LOADED} models are compared side by side. Take one away with Space first."


class ModelsScreen(ConversationScreen):
    """List and prompt side by side; below 110 columns one of the two. The list follows the
    files.
    """

    NAME = "models"
    CSS_PATH: ClassVar[Any] = [STYLES, "models.tcss"]
    CHATS = False
    EMPTY = "Choose models with Space, or none for the one under the cursor. Enter: the prompt."
    NO_MODELS = "No model is chosen. Press Esc, and choose one with Space."
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
        Binding("y", "copy", "copy the answer", id="models.copy"),
        Binding("v", "verify", "check all files again", id="models.verify", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.library = self.session.models.library
        self.evaluation = Evaluation(self.workbench.params_path)
        self.table = ModelList(self.evaluation)
        self.table_pane = self.pane("models", self.table)
        self.details_pane = DetailsPane(self.workbench, self.session.models)
        self._wanted: Path | None = None  # to be pointed at once it is listed
        self._is_stale, self._next_look = False, 0.0  # whether and when to look at the files
        self._stop_scan = threading.Event()
        self.field.placeholder = "a prompt; Enter asks the chosen models"

    def body(self) -> Iterable[Widget]:
        yield Horizontal(
            Vertical(self.table_pane, self.details_pane, id="left"),
            Vertical(*super().body(), id="right"),
        )

    def on_mount(self) -> None:
        for folder in self.folders():
            if not folder.is_dir():
                self.warn(f"{folder} is not a folder, so it is not searched for models.")
        self._start_scan()

    def on_unmount(self) -> None:
        self._stop_scan.set()
        self.evaluation.stop()

    # What the app and other screens ask

    def open_with(
        self,
        select: Path | str | None = None,
        chosen: Sequence[Path] | None = None,
        prompt: str = "",
        **_: Any,
    ) -> None:
        """Point at the model in a folder; let Chat's models be chosen anew; put a text into the
        prompt.
        """
        if chosen is not None:
            self.choose(chosen)
            self.workbench.log_message(CHOOSE)
            select = next(iter(chosen), None)
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

    def _is_in_conversation(self) -> bool:
        return self.focused_pane in (self.history_pane, self.message_pane)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        can_do = super().check_action(action, parameters)
        if action == "leave" and not self.is_writing():
            return can_do or self._is_in_conversation() or bool(self.table.needle)
        return can_do

    def action_prompt(self) -> None:
        self.add_class("-prompt")
        self.give_focus(self.field)

    def action_browse(self) -> None:
        self.remove_class("-prompt")
        self.give_focus(self.table)

    def action_leave(self) -> None:
        """Esc: leave the field, the enlarged pane, then the conversation for the list."""
        if self.table.has_focus and self.table.needle:
            self.table_pane.close_filter()  # it was kept with Enter
        elif self.maximized or not self._is_in_conversation():
            super().action_leave()
        elif self.field.has_focus and self.history.last and self.has_class("-narrow"):
            self.leave_field()  # the list would cover the answers
        else:
            self.action_browse()

    # The list of models

    def _start_scan(self) -> None:
        self.search_folders()
        self._stop_scan.set()
        take = partial(self.call_later, self._take)
        self._stop_scan = start_scan(self.library, take, self.table.seen)
        if self.is_current:
            self.follow_files()

    def _take(self, entries: list[Entry]) -> None:
        """Show what a scan found; models without a verdict are not checked yet."""
        self.table.show_entries(entries)
        unchecked = sum(entry.verdict is None for entry in entries)
        facts = [f"{len(entries):,}"] * bool(entries)
        facts += [f"checking {unchecked:,}"] * bool(unchecked)
        self.table_pane.show_title(*facts)
        self._point_at_wanted()
        self._update_prompt()
        if entries:
            self.engine_line.start()

    def _point_at_wanted(self) -> None:
        if self._wanted and self.table.point(self._wanted):
            self._wanted = None

    def choose(self, paths: Sequence[Path]) -> None:
        self.table.chosen = list(paths)
        self.table.refresh()
        self._update_prompt()

    @work(exclusive=True, group="use")
    async def _update_prompt(self) -> None:
        """Let a prompt go to the chosen models, unless it does already."""
        entries = self.table.chosen_entries()
        if [each.model for each in entries] != [each.model for each in self.session.entries]:
            await self.use(entries)

    @on(Table.Pointed, "#models Table")
    def _line_pointed(self, event: Table.Pointed) -> None:
        self.details_pane.show_line(event.row)
        self._update_prompt()

    @on(Table.Opened, "#models Table")
    def _line_opened(self, event: Table.Opened) -> None:
        line = event.row
        if isinstance(line, Folder):
            self.table.fold(line.label, line.label not in self.table.folded)
        else:
            self.action_prompt()

    @on(Table.Chosen, "#models Table")
    def _line_chosen(self, event: Table.Chosen) -> None:
        """Choose a model, or those of a folder; or none of them any more if all were."""
        paths, chosen = [entry.model.path for entry in entries_of(event.row)], self.table.chosen
        more = [path for path in paths if path not in chosen]
        if not more:
            self.choose([path for path in chosen if path not in paths])
            return
        if len(chosen) + len(more) > MAX_LOADED:
            self.warn(TOO_MANY)
        self.choose([*chosen, *more][:MAX_LOADED])

    def action_pipeline(self) -> None:
        """Choose the pipeline's models; if they are chosen, none."""
        own = [entry.model.path for entry in self.table.entries if not entry.group][:MAX_LOADED]
        if not own:
            self.warn("The pipeline has made no model yet. R runs it.")
        self.choose([] if self.table.chosen == own else own)

    def action_verify(self) -> None:
        self.library.forget()
        self._start_scan()
        self.workbench.log_message("All models are being checked again.")

    @work
    async def action_folder(self) -> None:
        """Add a folder to search, also in later sessions; a folder that was added before is
        removed.
        """
        name = await self.app.push_screen_wait(AskText(FOLDER_QUESTION))
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
        here = [entry.model.path for entry in self.table.chosen_entries()]
        if here:
            self.workbench.go("chat", models=self.table.chosen or here)
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

    def action_fields(self) -> None:
        self.details_pane.show_fields()

    def action_spectrum(self) -> None:
        self.details_pane.measure()

    @work(group="evaluate")
    async def action_evaluate(self) -> None:
        """Evaluate the adapters that are chosen, or under the cursor, and were not yet."""
        table = self.table
        adapters = []
        for entry in table.chosen_entries() or entries_of(table.pointed):
            if entry.model.kind == "adapter" and entry.group and kept(entry) is None:
                adapters.append(entry.model.path)
        if not adapters:
            self.warn(NO_ADAPTER)
            return
        with self.workbench.errors_shown():
            running = self.evaluation.run(adapters)
            self.call_later(table.refresh)  # it is measuring
            if problems := await running:
                self.warn(problems)
            else:
                self.workbench.log_message(f"Adapters evaluated: {len(adapters)}.")
        self._start_scan()
