"""What the screens Chat and Models have in common: they ask models, and show a conversation."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.widget import Widget

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.home import expand
from pipeline.inference.talk import Answer, Talk, Turn
from pipeline.inference.transcript import render, training_row
from pipeline.views.model_library import Entry
from tui.dialogs import Ask, ask_file
from tui.panes.menu import Menu
from tui.panes.pane import About
from tui.screens.base import WorkbenchScreen
from tui.screens.conversation.about import HISTORY, MESSAGE
from tui.screens.conversation.engine import EngineLine
from tui.screens.conversation.field import MessageField
from tui.screens.conversation.sampling import Sampling, SamplingDialog
from tui.screens.conversation.session import STRONGEST, Session
from tui.screens.conversation.turns import History, Replied, Stop
from tui.services.loaded_models import shared_models

STYLES = Path(__file__).with_name("conversation.tcss")
FRAME = 0.08  # seconds between two pictures of an answer
STEP = 0.05  # of the strength
MAX_PROMPTS = 200  # that are saved: the palette has the newest
NO_SCALE = "Strength scales an adapter's weight changes. None of these models is such an adapter."
NO_TEMPLATE = "Not all of these models have a chat template, so they were prompted without it."
IS_WRITING = "An answer is being written. Esc interrupts it."
SAVE_QUESTION = (
    "Save to which file? .md: as text, .json: with all branches, .jsonl: as rows of training data."
)


class ConversationScreen(WorkbenchScreen):
    """Subclasses call `use` with models.

    CHATS: a model reads the messages before. EMPTY: what stands where no message is yet, and
    NO_MODELS, where no model can be asked.
    """

    PANES: ClassVar[Mapping[str, About]] = {"history": HISTORY, "message": MESSAGE}
    CHATS: ClassVar[bool] = True
    SAMPLING: ClassVar[Sampling] = Sampling()
    EMPTY: ClassVar[str] = ""
    NO_MODELS: ClassVar[str] = "There is no model yet. Press Esc, then R, to run the pipeline."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "interrupt", "Interrupt", id="chat.interrupt"),
        Binding("escape", "leave", "Leave", id="app.leave"),
        Binding(
            "ctrl+up,right_square_bracket",
            "strength(1)",
            "Stronger",
            id="chat.stronger",
            show=False,
        ),
        Binding(
            "ctrl+down,left_square_bracket", "strength(-1)", "Weaker", id="chat.weaker", show=False
        ),
        Binding("ctrl+r", "again", "Ask again", id="chat.again"),
        Binding("ctrl+l", "settings", "Settings", id="chat.settings"),
        Binding("ctrl+g", "correct", "Correct → data", id="chat.correct"),
        Binding("ctrl+t", "thoughts", "Thoughts", id="chat.thoughts"),
        Binding("ctrl+s", "save", "Save", id="chat.save"),
        Binding("ctrl+n", "new", "New", id="chat.new"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.talk = Talk()
        self.session = Session(shared_models(self.workbench), self.SAMPLING, self.CHATS)
        self.engine = self.session.models.inference
        self._editing: Turn | None = None
        self._draft = ""  # of the field, while a message is edited
        self._drawn: object = None  # how far the answers are that are shown
        self._saved = 0  # answers when the conversation was last saved
        # Widgets are attributes: answers can arrive while the screen closes, and queries fail.
        self.history, self.field = History(self.session), MessageField()
        self.history_pane = self.pane("history", self.history)
        self.message_pane = self.pane("message", self.field)
        self.engine_line = EngineLine(self.workbench, self.engine)

    def body(self) -> Iterable[Widget]:
        return self.history_pane, self.message_pane, self.engine_line

    def on_mount(self) -> None:
        self._show()

    def tick(self) -> None:
        self.engine_line.show()

    def unsaved(self) -> str:
        """A single prompt of Models may be lost."""
        turns, few = len(list(self.talk.every_turn())), int(not self.CHATS)
        is_saved = self.talk.answer_count == self._saved
        return "" if is_saved or turns <= few else "an unsaved conversation"

    # Models

    async def use(self, entries: Sequence[Entry]) -> None:
        """Ask these models from now on."""
        library = self.session.models.library
        self.session.use(await asyncio.to_thread(lambda: [*map(library.read, entries)]))
        self._show()

    def folders(self) -> list[Path]:
        """The folders that the user added, in the config and here."""
        names = [*self.workbench.config.folders, *self.workbench.state.folders]
        return list(dict.fromkeys(self.workbench.root / expand(name) for name in names))

    def search_folders(self) -> None:
        """Let the library search the project's folders, and those of the user."""
        library = self.session.models.library
        library.folders = [*library.artifacts, *self.folders()]

    # Asking

    def action_send(self) -> None:
        """Ask the models what is in the field."""
        text = self.field.text.strip()
        if not text:
            self.warn("The message is empty. Type at least one word.")
        elif self._can_ask():
            state = self.workbench.state
            others = [prompt for prompt in state.prompts if prompt != text]
            state.prompts = [*others, text][-MAX_PROMPTS:]
            self.workbench.remember()
            talk, editing, answers = self.talk, self._editing, self.session.new_answers()
            turn = talk.edit(editing, text, answers) if editing else talk.ask(text, answers)
            self._stop_editing()
            self._ask(turn)

    def _can_ask(self) -> bool:
        problem = IS_WRITING if self.is_writing() else ""
        if not self.session.entries:
            problem = self.NO_MODELS
        if problem:
            self.warn(problem)
        return not problem

    def action_again(self) -> None:
        """Ask the message again that the cursor is on, else the last one."""
        stop = self._place("ask again")
        if stop and self._can_ask():
            self.talk.ask_again(stop.turn, self.session.new_answers())
            self._ask(stop.turn)

    @work(exclusive=True, group="ask")
    async def _ask(self, turn: Turn) -> None:
        # Now, while its branch is shown: one may look at another while it is answered.
        answers = self.engine_line.answers = turn.reply.answers
        requests = [(answer, self.talk.messages(turn, answer.model)) for answer in answers]
        self._show()
        self.refresh_bindings()
        writing = asyncio.create_task(self.session.write(turn.text, requests))
        try:
            while not writing.done():
                await asyncio.wait([writing], timeout=FRAME)
                self._draw(turn)
            await writing
            if self.session.template and not answers[0].chat and not self.CHATS:
                self.warn(NO_TEMPLATE)
        except UserError as error:
            self.workbench.fail(error)
        finally:
            writing.cancel()  # if it was interrupted
            await asyncio.gather(writing, return_exceptions=True)
            if self.is_attached:  # else the program is closing
                self._draw(turn)
                if self.engine.running:
                    self.engine_line.ask()
                self._show()
                self.call_later(self.refresh_bindings)

    def _draw(self, turn: Turn) -> None:
        """Draw the answers to a turn as they arrive."""
        progress = [(each.state, each.tokens, each.top_k) for each in turn.reply.answers]
        if progress == self._drawn:
            return
        self._drawn = progress
        self.engine_line.show()
        if turn in self.talk.turns[-1:]:  # else one looks at another branch meanwhile
            self.history.grew()
        self._show_title()

    def is_writing(self) -> bool:
        return any(worker.group == "ask" and worker.is_running for worker in self.workers)

    def action_interrupt(self) -> None:
        self.workers.cancel_group(self, "ask")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Esc interrupts an answer, else ends the editing of a message, else leaves the field."""
        if action == "interrupt":
            return self.is_writing()
        if action == "leave" and self.is_writing():
            return False
        return super().check_action(action, parameters)

    def leave_field(self) -> None:
        if self._editing:
            self._stop_editing()
        else:
            self.set_focus(self.history.last)

    # The history

    def _place(self, verb: str) -> Stop | None:
        """What the cursor is on, else the last reply; says so if there is nothing to …"""
        if isinstance(self.focused, Stop):
            return self.focused
        if self.history.views:
            return self.history.views[-1].replied
        self.warn(f"There is nothing to {verb} yet.")
        return None

    def action_to_history(self) -> None:
        self.set_focus(self.history.last or self.field)

    def action_to_field(self) -> None:
        self.give_focus(self.field)

    def action_page(self, by: int) -> None:
        height = max(self.history.size.height - 1, 1)
        self.history.scroll_relative(y=by * height, animate=False)

    def action_branch(self, by: int) -> None:
        """Show another branch of what the cursor is on."""
        stop = self.focused
        if isinstance(stop, Stop) and stop.branches.step(by):
            self._show_branch(stop)

    @work(group="branch")
    async def _show_branch(self, before: Stop) -> None:
        await self._show().wait()
        stops = self.history.query(type(before))
        self.set_focus(next(stop for stop in stops if stop.branches is before.branches))

    def action_copy(self) -> None:
        if stop := self._place("copy"):
            self.app.copy_to_clipboard(stop.text)
            self.workbench.log_message("Copied to the clipboard.")

    def action_open(self) -> None:
        """Edit the message that the cursor is on, or correct the answer."""
        stop = self.focused
        if isinstance(stop, Replied):
            self._correct(stop.turn)
        elif isinstance(stop, Stop):
            self._draft = self._draft if self._editing else self.field.text
            self._editing = stop.turn if self.CHATS else None
            self.field.fill(stop.text)
            self.give_focus(self.field)
            self._show_title()

    def _stop_editing(self) -> None:
        self.field.fill(self._draft if self._editing else "")
        self._draft, self._editing = "", None
        self._show_title()

    def action_thoughts(self) -> None:
        self.session.shows_thoughts = not self.session.shows_thoughts
        self._show()

    # An answer as data

    def action_correct(self) -> None:
        if stop := self._place("correct"):
            self._correct(stop.turn)

    @work(group="ask-user")
    async def _correct(self, turn: Turn) -> None:
        """Take an answer to the data, where it is corrected and becomes an example."""
        answers = {str(n): answer for n, answer in enumerate(turn.reply.answers) if answer.content}
        if not answers:
            self.warn("This message has no answer that could be corrected.")
            return
        key: str | None = next(iter(answers))
        if len(answers) > 1:
            choices = {n: f"{a.title}: {a.content.strip()[:60]}" for n, a in answers.items()}
            key = await self.app.push_screen_wait(Menu("Correct which answer?", choices))
        if key is not None:
            self.workbench.go("data", add=training_row(self.talk, turn, answers[key]))

    # Strength and settings

    def action_strength(self, by: int) -> None:
        if not self.session.scales:
            self.warn(NO_SCALE)
            return
        strength = min(max(self.session.strength + by * STEP, 0.0), STRONGEST)
        self.session.strength = round(strength, 2)
        self._show()
        if self.session.sampling.k and self.engine.running and self.history.views:
            self._fill_table()

    @work(exclusive=True, group="probe")
    async def _fill_table(self) -> None:
        """The table of the last turn at the strength that is set now; its answers stay."""
        view, answers = self.history.views[-1], list[Answer]()
        for answer in view.reply.answers:
            now = None if answer.strength is None else self.session.strength
            answers.append(replace(answer, strength=now))
        try:
            for answer in answers:
                await self.session.models.load(self.session.asked[answer.model])
            await self.session.fill_table(view.turn.text, answers)
        except UserError as error:
            self.workbench.fail(error)
        view.show_table(answers)

    @work(group="ask-user")
    async def action_settings(self) -> None:
        session = self.session
        given = asdict(session.sampling)
        if self.CHATS:
            given["system"] = self.talk.system
        else:
            given["template"] = "on" if session.template else "off"
        if chosen := await self.app.push_screen_wait(SamplingDialog(given)):
            self.talk.system = chosen.pop("system", "")
            session.template = chosen.pop("template", "on") == "on"
            session.sampling = Sampling(**chosen)
            self._show()

    # Files

    @work(group="ask-user")
    async def action_save(self) -> None:
        if not self._place("save"):
            return
        with self.workbench.errors_shown():
            if path := await ask_file(self.workbench, SAVE_QUESTION, "chat.md"):
                write_file(path, render(self.talk, path.suffix), durable=True)
                self._saved = self.talk.answer_count
                self.workbench.log_message(f"Saved the conversation to {path}.")

    @work(group="ask-user")
    async def action_new(self) -> None:
        """Begin a new conversation, with the same models and system prompt."""
        if lost := self.unsaved():
            question = f"A new conversation loses {lost}. Ctrl+S saves it."
            ask = Ask(question, {"y": "begin anew"}, "New conversation")
            if not await self.app.push_screen_wait(ask):
                return
        self.action_interrupt()
        self.talk, self._saved = Talk(self.talk.system), 0
        self._stop_editing()
        self._show()
        self.give_focus(self.field)

    # What is shown

    @work(group="show")
    async def _show(self) -> None:
        """Show the history and the titles anew."""
        empty = self.EMPTY if self.session.entries else self.NO_MODELS
        self.engine_line.show()
        await self.history.show(self.talk.turns, empty)
        turns = len(self.talk.turns)
        facts = [f"{turns} turn{'s' * (turns != 1)}"] * bool(turns)
        facts += ["system prompt"] * bool(self.talk.system)
        self.history_pane.show_title(*facts)
        self._show_title()

    def _show_title(self) -> None:
        title = "Edit message" if self._editing else MESSAGE.title
        self.message_pane.show_title(*self.session.facts(self.talk.turns), title=title)
