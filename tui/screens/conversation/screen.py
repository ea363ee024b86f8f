"""What the screens Chat and Models have in common: they ask models, and show a conversation."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.async_worker import WorkerDied
from pipeline.files.home import expand
from pipeline.files.text import in_units
from pipeline.inference.talk import Answer, Talk, Turn
from pipeline.inference.transcript import render, training_row
from pipeline.views.model_library import Entry
from tui.dialogs import Ask, PathScreen
from tui.panes.menu import Menu
from tui.panes.pane import About
from tui.screens.base import WorkbenchScreen
from tui.screens.conversation.field import MessageField
from tui.screens.conversation.sampling import SamplingDialog
from tui.screens.conversation.session import Session, method_of
from tui.screens.conversation.turns import History, Showing, Stop
from tui.services.loaded_models import Latest, Sampling, shared_models
from tui.services.vocabulary import Vocabulary, unknown_words
from tui.services.vocabulary import vocabulary as vocabulary_of
from tui.widgets.cells import method_sign

STYLES = Path(__file__).with_name("conversation.tcss")
FRAME, SHARE = 0.08, 0.2  # seconds between two pictures of an answer at least; of the time at most
STATUS_EVERY = 2  # ticks between two looks at the engine
STEP, STRONGEST, TRACK = 0.05, 2.0, 11  # of the strength; cells of its scale
MAX_PROMPTS = 200  # in the saved history
MAX_NAMES = 4  # of models in the title
NO_SCALE = "Strength scales an adapter's weight changes. None of these models is such an adapter."
NO_TEMPLATE = "Not all of these models have a chat template, so they were prompted without it."
BUSY = "An answer is being written. Esc interrupts it."
SAVE_QUESTION = (
    "Save to which file? .md: as text, .json: with all branches, .jsonl: as rows of training data."
)
ENGINE = {  # state → sign, style, hint
    "not started": ("○", "", "the first prompt starts it"),
    "starting": ("◌", "", "importing libraries"),
    "ready": ("●", "$success", ""),
    "loading": ("◌", "", "Esc interrupts"),
    "busy": ("◐", "", "Esc interrupts"),
    "died": ("✗", "$error", "ask again to start a new one"),
}
HISTORY = About(
    "Conversation",
    """\
The messages and the answers, newest last. With several models, each reads the messages and *its own*
answers. The table has the most likely next tokens of each, in percent, and how that differs from the
first.

- The cursor is the line at the left: ↑ ↓ move it, Enter edits the message it is on (the former one
  stays as a branch), or takes the answer it is on to the data, to be corrected; `y` copies
- `‹ 2/3 ›` is the second of three branches; ← → show the others, with all that followed
- `▸ thoughts` are folded; Ctrl+T shows them. Thoughts are not part of what the model reads in
  later turns
- `◌` waits, `◐` writes, `▪` was interrupted, `…` reached the limit, `✗` failed
- *tokens/s* counts from the first token on; reading the prompt is not part of it
- yellow text tells what no longer fitted into the model's window and was left out, or that an
  answer was given at another strength than the one that is set""",
)
MESSAGE = About(
    "Message",
    """\
Enter asks, Ctrl+J begins a new line, ↑ in the first line goes to the history.

The title: the models, the strength of adapters from 0 (the base) over 1 (as trained) to 2, the
tokens of the model's window that the last turn used, and the sampling. A model without a chat
template goes on with the text: the messages and answers are one text for it, and the system prompt
stands before them. The line below is the process that runs the models.""",
)


class ConversationScreen(WorkbenchScreen):
    """Subclasses set CHATS and SAMPLING, yield `conversation()`, and call `use` with models."""

    PANES: ClassVar[Mapping[str, About]] = {"history": HISTORY, "message": MESSAGE}
    CHATS: ClassVar[bool] = True
    FEW: ClassVar[int] = 0  # turns that may be lost without a question
    SAMPLING: ClassVar[Sampling] = Sampling()
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
        self.engine_state, self.engine_facts = "not started", ""
        self._editing: Turn | None = None
        self._draft = ""  # of the field, while a message is edited
        self._thoughts = False
        self._vocabularies: Sequence[Vocabulary] = ()  # of the models
        self._saved = 0  # answers when the conversation was last saved
        self._probe, self._shower = Latest(self._fill_table), Latest(self._show_history)
        self._ticks = 0
        # Widgets are attributes: answers can arrive while the screen closes, and queries fail.
        self.history, self.field = History(), MessageField()
        self.history_pane = self.pane("history", self.history)
        self.message_pane = self.pane("message", self.field)
        self.engine_line = Static(id="engine", markup=False)

    def conversation(self) -> Sequence[Widget]:
        """The widgets of the conversation, from top to bottom."""
        return self.history_pane, self.message_pane, self.engine_line

    def on_mount(self) -> None:
        self._show()
        self._show_engine()

    def unsaved(self) -> str:
        turns = len(list(self.talk.every_turn()))
        if self.talk.answer_count == self._saved or turns <= self.FEW:
            return ""
        return f"a conversation of {turns} turn{'s' * (turns != 1)}"

    # Models

    async def use(self, entries: Sequence[Entry]) -> None:
        """Ask these models from now on; words that they do not know are named while one types."""
        library = self.session.models.library

        def read() -> list[tuple[Entry, Vocabulary]]:
            pairs = []
            for entry in map(library.read, entries):
                base = library.base(entry.model)
                pairs.append((entry, vocabulary_of(base) if base else None))
            return pairs

        pairs = await asyncio.to_thread(read)
        self.session.use([entry for entry, _ in pairs])
        self._vocabularies = [words for _, words in pairs]
        self._show()

    def folders(self) -> list[Path]:
        """The folders that the user added, in the config and here."""
        names = [*self.workbench.config.folders, *self.workbench.state.folders]
        return list(dict.fromkeys(self.workbench.root / expand(name) for name in names))

    # Asking

    @on(MessageField.Sent)
    def _sent(self, event: MessageField.Sent) -> None:
        self.send(event.text.strip())

    def send(self, text: str) -> None:
        """Ask the models a message."""
        if not text:
            self.warn("The message is empty. Type at least one word.")
        elif not self.session.entries:
            self.warn(self.no_models())
        elif self.is_writing():
            self.warn(BUSY)
        else:
            state = self.workbench.state
            others = (prompt for prompt in state.prompts if prompt != text)
            state.prompts = [*others, text][-MAX_PROMPTS:]
            self.workbench.remember()
            answers, editing = self.session.new_answers(), self._editing
            turn = self.talk.edit(editing, text, answers) if editing else None
            turn = turn or self.talk.ask(text, answers)
            self._stop_editing()
            self._ask(turn)

    def no_models(self) -> str:
        """What to say where no model can be asked."""
        return "There is no model yet. Press Esc, then R, to run the pipeline."

    def action_again(self) -> None:
        """Ask the message again that the cursor is on, else the last one."""
        turns, stop = self.talk.turns, self.focused
        if not turns:
            self.warn("There is nothing to ask again yet.")
        elif self.is_writing():
            self.warn(BUSY)
        elif self.session.entries:
            turn = stop.turn if isinstance(stop, Stop) else turns[-1]
            self.talk.ask_again(turn, self.session.new_answers())
            self._ask(turn)

    @work(exclusive=True, group="ask")
    async def _ask(self, turn: Turn) -> None:
        # Now, while its branch is shown: one may look at another while it is answered.
        answers = turn.reply.answers
        requests = [(answer, self.talk.messages(turn, answer.model)) for answer in answers]
        self._set_engine("busy" if self.engine.running else "starting")
        self._show()
        died = False
        try:
            async with aclosing(self.session.write(turn.text, requests)) as changes:
                await self._follow(turn, changes)
            if self.session.template and not answers[0].chat and not self.CHATS:
                self.warn(NO_TEMPLATE)
        except UserError as error:
            died = isinstance(error, WorkerDied)
            self.workbench.fail(error)
        finally:
            if self.is_attached:  # else the program is closing
                self._set_engine("died" if died or not self.engine.running else "ready")
                self._show()
                self.call_later(self.refresh_bindings)

    async def _follow(self, turn: Turn, changes: Any) -> None:
        """Draw an answer as it arrives, in a part of the time that grows no longer with it."""
        next_at, state = 0.0, ""
        async for answer in changes:
            if answer.state != state or monotonic() >= next_at:
                started, state = monotonic(), answer.state
                if state == "loading":
                    self._set_engine("loading", answer.label)
                elif self.engine.running:
                    self._set_engine("busy")
                if turn in self.talk.turns[-1:]:  # else one looks at another branch meanwhile
                    self.history.grew(self._showing())
                self._show_title()
                next_at = monotonic() + max(FRAME, (monotonic() - started) / SHARE)
            # tokens may arrive faster than they are drawn: let keys through
            await asyncio.sleep(0)

    def is_writing(self) -> bool:
        return any(worker.group == "ask" and worker.is_running for worker in self.workers)

    def action_interrupt(self) -> None:
        self.workers.cancel_group(self, "ask")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Esc interrupts an answer, else ends the editing of a message, else leaves the field."""
        if action == "interrupt":
            return self.is_writing()
        if action == "leave":
            can_leave = super().check_action(action, parameters)
            return not self.is_writing() and bool(self._editing or can_leave)
        return super().check_action(action, parameters)

    def action_leave(self) -> None:
        if self._editing and self.field.has_focus:
            self._stop_editing()
        else:
            super().action_leave()

    # The history

    @on(MessageField.Left)
    def to_history(self) -> None:
        if self.history.last:
            self.set_focus(self.history.last)

    @on(MessageField.Paged)
    def _page(self, event: MessageField.Paged) -> None:
        height = max(self.history.size.height - 1, 1)
        self.history.scroll_relative(y=event.by * height, animate=False)

    @on(Stop.Left)
    def _to_field(self) -> None:
        self.give_focus(self.field)

    @on(Stop.Switched)
    async def _show_branch(self) -> None:
        stop = self.focused
        await self._shower.run()
        if isinstance(stop, Stop) and self.talk.turns:
            turn = next((t for t in self.talk.turns if t.siblings is stop.turn.siblings), None)
            again = self.history.stop_of(turn, stop.is_reply) if turn else None
            self.set_focus(again or self.history.last)

    @on(Stop.Copied)
    def _copy(self, event: Stop.Copied) -> None:
        self.app.copy_to_clipboard(event.text)
        self.workbench.log_message("Copied to the clipboard.")

    @on(Stop.Opened)
    def _stop_opened(self, event: Stop.Opened) -> None:
        """Edit a message, or correct an answer."""
        if event.is_reply:
            self._correct(event.turn)
            return
        self._draft = self._draft if self._editing else self.field.text
        self._editing = event.turn if self.CHATS else None
        self.field.fill(event.turn.text)
        self.give_focus(self.field)
        self._show_title()

    def _stop_editing(self) -> None:
        self.field.fill(self._draft if self._editing else "")
        self._draft, self._editing = "", None
        self._show_title()
        self.refresh_bindings()

    def action_thoughts(self) -> None:
        self._thoughts = not self._thoughts
        self._show()

    # An answer as data

    def action_correct(self) -> None:
        turns, stop = self.talk.turns, self.focused
        if turns:
            self._correct(stop.turn if isinstance(stop, Stop) else turns[-1])
        else:
            self.warn("There is no answer to correct yet.")

    @work(group="ask-user")
    async def _correct(self, turn: Turn) -> None:
        """Take an answer to the data, where it is corrected and becomes an example."""
        answers: dict[str, Answer] = {}
        for number, answer in enumerate(turn.reply.answers):
            if answer.content:
                answers[str(number)] = answer
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
            self.run_worker(self._probe.run(), group="probe")

    async def _fill_table(self) -> None:
        """The table of the last turn at the strength that is set now; its answers stay."""
        view, strength = self.history.views[-1], self.session.strength
        answers = []
        for answer in view.reply.answers:
            now = None if answer.strength is None else strength
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
        system = self.talk.system if self.CHATS else None
        template = None if self.CHATS else self.session.template
        dialog = SamplingDialog(self.session.sampling, system=system, chat=template)
        if chosen := await self.app.push_screen_wait(dialog):
            self.session.sampling = chosen.sampling
            self.session.template = self.CHATS or bool(chosen.chat)
            self.talk.system = chosen.system or ""
            self._show()

    # Files

    @work(group="ask-user")
    async def action_save(self) -> None:
        if not self.talk.turns:
            self.warn("There is nothing to save yet.")
            return
        name = await self.app.push_screen_wait(PathScreen(SAVE_QUESTION, "chat.md"))
        if name is None:
            return
        path = self.workbench.root / expand(name)
        with self.workbench.errors_shown():
            question = Ask(f"{path} exists.", {"y": "replace it"}, "Save")
            if path.exists() and not await self.app.push_screen_wait(question):
                return
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
        self.workers.cancel_group(self, "ask")
        self.talk, self._saved = Talk(self.talk.system), 0
        self._stop_editing()
        self._show()
        self.give_focus(self.field)

    # What is shown

    def _showing(self) -> Showing:
        binding = next(b for b in self._bindings.get_bindings_for_key("ctrl+r"))
        again = self.app.get_key_display(binding)
        styles = {}
        for path, entry in self.session.asked.items():
            styles[path] = method_sign(method_of(entry))[1]
        return Showing(styles, self._thoughts, self.session.strength, again)

    def _show(self) -> None:
        """Show the history and the titles anew."""
        self.run_worker(self._shower.run(), group="show")

    async def _show_history(self) -> None:
        empty = self.empty() if self.session.entries else self.no_models()
        await self.history.show(self.talk.turns, self._showing(), empty)
        turns, every = len(self.talk.turns), len(list(self.talk.every_turn()))
        facts = [f"{turns} turn{'s' * (turns != 1)}"] * bool(turns)
        facts += [f"{every} on all branches"] * (every != turns)
        facts += ["system prompt"] * bool(self.talk.system)
        self.history_pane.show_title(*facts)
        self.field.earlier = () if turns and self.CHATS else self.workbench.state.prompts
        self._show_title()

    def empty(self) -> str:
        """What stands where no message is yet."""
        return "Type a message below; Enter asks."

    @on(MessageField.Changed)
    def _typed(self) -> None:
        if any(words is not None for words in self._vocabularies):
            self._show_title()

    def _show_title(self) -> None:
        """What is set, the most important first: what does not fit is cut at the end."""
        session, names = self.session, list[Content]()
        for entry in session.entries[:MAX_NAMES]:
            names.append(Content.styled(entry.label, method_sign(method_of(entry))[1]))
        more = len(session.entries) - MAX_NAMES
        models = Content(" beside ").join(names) if names else Content("no model")
        facts: list[Content | str] = [models, *[f"and {more} more"] * (more > 0)]
        facts += ["recorded answers"] * session.models.inference.replays
        if session.scales:
            facts.append(f"×{session.strength:.2f} {_track(session.strength)}")
        if unknown := self._unknown_words():
            facts.append(Content.styled(f"not in the vocabulary: {unknown}", "$text-warning"))
        facts += [used] if (used := _window_used(self.talk.turns)) else []
        facts.append(str(session.sampling))
        facts += ["chat template"] * (session.template and not self.CHATS)
        title = "Edit message" if self._editing else MESSAGE.title
        self.message_pane.show_title(*facts, title=title)

    def _unknown_words(self) -> str:
        """The typed words that a word-level model does not know."""
        text, spans = self.field.text, set[tuple[int, int]]()
        for words in self._vocabularies:
            spans.update(unknown_words(text, words))
        return " ".join(dict.fromkeys(text[start:stop] for start, stop in sorted(spans)))

    # The engine

    def tick(self) -> None:
        """Look at the engine now and then."""
        self._ticks += 1
        if self._ticks % STATUS_EVERY or self.is_writing() or self.engine_state == "starting":
            return
        if self.engine.running:
            self._read_status()
        elif self.engine_state in ("ready", "busy"):
            self._set_engine("died")

    @work(exclusive=True, group="status")
    async def _read_status(self) -> None:
        """Ask the engine; this starts it, before the first question needs it."""
        if not self.engine.running:
            self._set_engine("starting")
        try:
            facts = await self.engine.ask("status")
        except UserError as error:
            self._set_engine("died")
            self.workbench.fail(error)
            return
        count = len(facts["loaded"])
        memory = f"{in_units(facts['memory_used'])} of {in_units(facts['memory_total'])}"
        parts = [facts["device"], memory, f"{count} model{'s' * (count != 1)}", facts["name"]]
        self.engine_facts = " · ".join(parts)
        if not self.is_writing():
            self._set_engine("ready")

    def start_engine(self) -> None:
        """Start the process before the first question: importing libraries takes seconds."""
        if self.engine_state == "not started":
            self._read_status()

    def _set_engine(self, state: str, model: str = "") -> None:
        self.engine_state = state
        self._show_engine(model)

    def _show_engine(self, model: str = "") -> None:
        sign, style, hint = ENGINE[self.engine_state]
        name = f"{sign} engine {self.engine_state} {model}".rstrip()
        facts = self.engine_facts if self.engine_state in ("ready", "busy") else ""
        rest = [f" · {part}" for part in (hint, facts) if part]
        self.engine_line.update(
            Content.assemble((name, style), ("".join(rest), "$foreground-muted"))
        )


def _track(strength: float) -> str:
    """━━━━━┿━●┄┄┄"""
    position, middle = (round(value / STRONGEST * (TRACK - 1)) for value in (strength, 1.0))
    cells = ["━" if cell < position else "┄" for cell in range(TRACK)]
    cells[middle] = "┿" if middle < position else "┊"
    cells[position] = "●"
    return "".join(cells)


def _window_used(turns: Sequence[Turn]) -> str:
    """The part of the window that the last turn took, of the model that it filled most."""
    used = []
    for answer in turns[-1].reply.answers if turns else ():
        if answer.window:
            used.append((answer.prompt_tokens + answer.tokens, answer.window))
    if not used:
        return ""
    tokens, window = max(used, key=lambda pair: pair[0] / pair[1])
    return f"context {tokens:,} of {window:,}"
