"""The chat: several turns with one model, or with two side by side."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.widget import Widget

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.home import expand
from pipeline.views.model_library import Entry
from pipeline.views.models import describe
from tui.dialogs import Ask, Menu, PathScreen
from tui.screens.base import WorkbenchScreen
from tui.screens.chat.history import History, HistoryPane
from tui.screens.chat.lines import Showing
from tui.screens.chat.message import MessageField, MessagePane
from tui.screens.chat.picker import ModelPicker
from tui.screens.chat.session import MOST_MODELS, Request, Session, method_of
from tui.screens.chat.settings import SettingsScreen
from tui.screens.chat.talk import Answer, Talk, Turn
from tui.screens.chat.transcript import render, training_row
from tui.services.loaded_models import shared_models
from tui.services.vocabulary import Vocabulary, unknown_words
from tui.services.vocabulary import vocabulary as vocabulary_of
from tui.widgets.colors import method_style
from tui.widgets.prompting import STEP, STRONGEST

FRAME = 0.08  # seconds between two pictures of an answer that arrives, at least
MAX_PROMPTS = 200  # in the saved history
SAVE_QUESTION = (
    "Save to which file? .md: as text, .json: with all branches, .jsonl: as rows of training data."
)
NO_MODELS = "There is no model yet. Press Esc, then R, to run the pipeline."
EMPTY = """Type a message below; Enter asks. A model without a chat template goes on with the text.

Ctrl+O    the model, or two side by side
Ctrl+↑ ↓  strength of adapters
Ctrl+L    system prompt and sampling
Ctrl+T    thoughts of reasoning models, shown or folded
Ctrl+G    correct an answer: it becomes a row of training data
Ctrl+S    save the conversation as text or as data"""


class ChatScreen(WorkbenchScreen):
    """History above, message below. A conversation stays when another screen is shown."""

    NAME: ClassVar[str] = "chat"
    HELP = """\
Talk to one model, or to two side by side: each reads the same messages and its own answers.
Nothing that was said is lost: an edited message and an answer that was asked again begin a branch.
An answer can become a row of training data (Ctrl+G), the conversation a file (Ctrl+S)."""
    CSS_PATH = "chat.tcss"
    AUTO_FOCUS = "MessageField"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "interrupt", "Interrupt", id="chat.interrupt"),
        Binding("escape", "leave", "Leave", id="app.leave"),
        Binding("ctrl+o", "models", "Models", id="chat.models"),
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
        self.session = Session(shared_models(self.workbench))
        self.entries: list[Entry] = []  # that can be chosen
        self._editing: Turn | None = None
        self._draft = ""  # of the field, while a message is edited
        self._thoughts = False
        self._vocabularies: list[Vocabulary] = []  # of the models
        self._saved = 0  # answers when the conversation was last saved
        # Widgets are attributes, because answers can arrive while the screen closes and queries
        # fail.
        self.history, self.field = History(), MessageField()
        self.history_pane = HistoryPane(self.history, id="history")
        self.message_pane = MessagePane(self.field, id="message")

    def body(self) -> Iterable[Widget]:
        yield self.history_pane
        yield self.message_pane

    def on_mount(self) -> None:
        self.app.theme_changed_signal.subscribe(self, lambda _: self._update())
        self._find_models()
        self._warm_up()
        self._update()

    # what the app and other screens ask

    def unsaved(self) -> str:
        turns = len(list(self.talk.every_turn()))
        if self._answer_count() == self._saved:
            return ""
        return f"a conversation of {turns} turn{'s' * (turns != 1)}"

    def open_with(self, models: Sequence[Path | str] = (), prompt: str = "", **_: Any) -> None:
        """Chat with these models; `prompt` is put into the field."""
        if models:
            self._are_given = True
            self._use_paths([str(path) for path in models[:MOST_MODELS]])
        if prompt:
            self.field.text = prompt
        self.give_focus(self.field)

    def project_changed(self) -> None:
        if not self.session.entries:
            self._find_models()

    # models

    _are_given = False  # by another screen, so that none is chosen here

    @work(exclusive=True, group="find")
    async def _find_models(self) -> None:
        """List the models, the pipeline's own first; without a choice, chat with its first
        adapter.
        """
        library = self.session.models.library
        library.folders = [*library.artifacts, *self._folders()]

        def found() -> list[Entry]:
            # what a model is decides the order of the pipeline's own
            return [entry if entry.group else library.read(entry) for entry in library.scan()]

        entries = await asyncio.to_thread(found)
        self.entries = sorted(
            entries, key=lambda entry: (bool(entry.group), entry.group, entry.sort_key)
        )
        if not self.session.entries and self.entries and not self._are_given:
            adapters = (entry for entry in self.entries if entry.model.kind == "adapter")
            await self._use([next(adapters, self.entries[0])])

    def _folders(self) -> list[Path]:
        names = [*self.workbench.config.folders, *self.workbench.state.folders]
        return [self.workbench.root / expand(name) for name in names]

    @work(exclusive=True, group="use")
    async def _use_paths(self, paths: Sequence[str]) -> None:
        """Chat with the models in these folders, also if they were not found yet."""
        library = self.session.models.library
        known = {str(entry.model.path): entry for entry in self.entries}
        chosen = list[Entry]()
        for path in paths:
            folder = Path(path)
            if path in known:
                chosen.append(known[path])
            elif folder.is_dir():
                chosen.append(
                    Entry(library.label(folder), await asyncio.to_thread(describe, folder), None)
                )
            else:
                self.warn(f"{path} is not a model folder. Choose another model (Ctrl+O).")
        if chosen:
            await self._use(chosen)

    async def _use(self, entries: Sequence[Entry]) -> None:
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
        self._update()

    @work(group="ask-user")
    async def action_models(self) -> None:
        await self._find_models().wait()  # some may have been trained since
        if not self.entries:
            self.warn(NO_MODELS)
            return
        chosen = [str(entry.model.path) for entry in self.session.entries]
        paths = await self.app.push_screen_wait(ModelPicker(self.entries, chosen))
        if paths:
            self._use_paths(paths)

    @work(group="warm")
    async def _warm_up(self) -> None:
        """Start the engine before the first question: importing its libraries takes seconds."""
        with self.workbench.errors_shown():
            await self.session.models.inference.ask("status")

    # asking

    @on(MessageField.Sent)
    def send(self, event: MessageField.Sent) -> None:
        text = event.text.strip()
        if not text:
            self.warn("The message is empty. Type at least one word.")
        elif not self.session.entries:
            self.warn(NO_MODELS)
        elif self._is_writing():
            self.warn("An answer is being written. Esc interrupts it.")
        else:
            state = self.workbench.state
            state.prompts = [*(other for other in state.prompts if other != text), text][
                -MAX_PROMPTS:
            ]
            self.workbench.remember()
            answers = self.session.new_answers()
            turn = self._editing and self.talk.edit(self._editing, text, answers)
            turn = turn or self.talk.ask(text, answers)
            self._stop_editing()
            self._ask(turn, self._requests(turn))

    def action_again(self) -> None:
        """Ask the message again that the cursor is on, else the last one."""
        turns = self.talk.turns
        if not turns:
            self.warn("There is nothing to ask again yet.")
        elif self._is_writing():
            self.warn("An answer is being written. Esc interrupts it.")
        elif self.session.entries:
            stop = self.history.stop
            turn = (
                stop.turn if stop and stop.turn in turns and self.history.has_focus else turns[-1]
            )
            self.talk.ask_again(turn, self.session.new_answers())
            self._ask(turn, self._requests(turn))

    def _requests(self, turn: Turn) -> list[Request]:
        """What is asked, while its branch is the one that is shown: one may look at another while
        it is answered.
        """
        return [(answer, self.talk.messages(turn, answer.model)) for answer in turn.reply.answers]

    @work(exclusive=True, group="ask")
    async def _ask(self, turn: Turn, requests: Sequence[Request]) -> None:
        self._update()
        self.history.scroll_end(animate=False)
        try:
            async with aclosing(self.session.write(requests)) as changes:
                drawn_at, drawn_state = 0.0, ""
                async for answer in changes:
                    if answer.state != drawn_state or monotonic() - drawn_at >= FRAME:
                        if answer.state != drawn_state:
                            self._update_title()
                            self.refresh_bindings()
                        # else one looks at another branch meanwhile
                        if self.talk.turns[-1:] == [turn]:
                            self.history.grew()
                        drawn_at, drawn_state = monotonic(), answer.state
                    # tokens may arrive faster than they are drawn: let keys through
                    await asyncio.sleep(0)
        except UserError as error:  # the engine died
            self.workbench.fail(error)
        finally:
            self._update()
            self.call_later(self.refresh_bindings)

    def _is_writing(self) -> bool:
        return any(worker.group == "ask" and worker.is_running for worker in self.workers)

    def action_interrupt(self) -> None:
        self.workers.cancel_group(self, "ask")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Esc interrupts an answer, else ends the editing of a message, else leaves the field."""
        if action == "interrupt":
            return self._is_writing()
        if action == "leave":
            return not self._is_writing() and bool(
                self._editing or super().check_action(action, parameters)
            )
        return super().check_action(action, parameters)

    def action_leave(self) -> None:
        if self._editing and self.field.has_focus:
            self._stop_editing()
        else:
            super().action_leave()

    def leave_field(self) -> None:
        self.set_focus(self.history)

    # the history

    @on(MessageField.Left)
    def to_history(self) -> None:
        if self.talk.turns:
            self.set_focus(self.history)
            self.history.point_last()

    @on(MessageField.Paged)
    def page(self, event: MessageField.Paged) -> None:
        self.history.scroll_relative(
            y=event.by * max(self.history.size.height - 1, 1), animate=False
        )

    @on(History.Left)
    def to_field(self) -> None:
        self.give_focus(self.field)

    @on(History.Switched)
    def show_branch(self) -> None:
        self._update()
        self.history.point(self.history.stop)

    @on(History.Copied)
    def copy(self, event: History.Copied) -> None:
        self.app.copy_to_clipboard(event.text)
        self.workbench.log_message("Copied to the clipboard.")

    @on(History.Opened)
    def open_stop(self, event: History.Opened) -> None:
        stop = event.on
        if stop.is_reply:
            self._correct(stop.turn)
        else:
            self._draft = self._draft if self._editing else self.field.text
            self._editing = stop.turn
            self.field.text = stop.turn.text
            self.field.move_cursor(self.field.document.end)
            self.give_focus(self.field)
            self._update_title()

    def _stop_editing(self) -> None:
        self.field.text = self._draft if self._editing else ""
        self.field.move_cursor(self.field.document.end)
        self._draft, self._editing = "", None
        self._update_title()
        self.refresh_bindings()

    def action_thoughts(self) -> None:
        self._thoughts = not self._thoughts
        self._update()

    # an answer as data

    def action_correct(self) -> None:
        turns, stop = self.talk.turns, self.history.stop
        if turns:
            self._correct(stop.turn if stop and self.history.has_focus else turns[-1])
        else:
            self.warn("There is no answer to correct yet.")

    @work(group="ask-user")
    async def _correct(self, turn: Turn) -> None:
        """Take an answer to the data, where it is corrected and becomes an example."""
        answers: dict[str, Answer] = {
            str(n): each for n, each in enumerate(turn.reply.answers) if each.content
        }
        if not answers:
            self.warn("This message has no answer that could be corrected.")
            return
        key: str | None = next(iter(answers))
        if len(answers) > 1:
            choices = {
                number: Text(f"{each.title}: {each.content.strip()[:60]}")
                for number, each in answers.items()
            }
            key = await self.app.push_screen_wait(Menu("Correct which answer?", choices))
        if key is not None:
            self.workbench.go("data", add=training_row(self.talk, turn, answers[key]))

    # strength and settings

    def action_strength(self, by: int) -> None:
        if not self.session.scales:
            self.warn(
                "Strength scales an adapter's weight changes. None of these models is such an "
                "adapter."
            )
            return
        self.session.strength = round(
            min(max(self.session.strength + by * STEP, 0.0), STRONGEST), 2
        )
        self._update()

    @work(group="ask-user")
    async def action_settings(self) -> None:
        settings = await self.app.push_screen_wait(
            SettingsScreen(self.talk.system, self.session.sampling)
        )
        if settings:
            self.talk.system, self.session.sampling = settings
            self._update()

    # files

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
            self._saved = self._answer_count()
            self.workbench.log_message(f"Saved the conversation to {path}.")

    @work(group="ask-user")
    async def action_new(self) -> None:
        """Begin a new conversation, with the same models and system prompt."""
        if lost := self.unsaved():
            question = f"A new conversation loses {lost}. Ctrl+S saves it."
            if not await self.app.push_screen_wait(
                Ask(question, {"y": "begin anew"}, "New conversation")
            ):
                return
        self.workers.cancel_group(self, "ask")
        system, self.talk, self._saved = self.talk.system, Talk(), 0
        self.talk.system = system
        self._stop_editing()
        self._update()
        self.give_focus(self.field)

    def _answer_count(self) -> int:
        return sum(
            len(reply.answers) for turn in self.talk.every_turn() for reply in turn.replies.items
        )

    # drawing

    def _update(self) -> None:
        """Draw history and titles anew."""
        again = self.app.get_key_display(self._again_key())
        showing = Showing(self._thoughts, self.session.strength, again)
        styles = {path: self._style_of(entry) for path, entry in self.session.asked.items()}
        self.history.empty = EMPTY if self.session.entries else NO_MODELS
        self.history.show(self.talk, showing, styles)
        turns, every = len(self.talk.turns), len(list(self.talk.every_turn()))
        facts = [f"{turns} turn{'s' * (turns != 1)}"] * bool(turns)
        facts += [f"{every} on all branches"] * (every != turns)
        facts += ["system prompt"] * bool(self.talk.system)
        self.history_pane.show_title(*facts)
        self._update_title()

    def _again_key(self) -> Binding:
        return next(b for b in self._bindings.get_bindings_for_key("ctrl+r"))

    def _update_title(self) -> None:
        names = [Text(entry.label, self._style_of(entry)) for entry in self.session.entries]
        self.message_pane.show(
            self.session, names, self.talk.turns, self._unknown_words(), self._editing is not None
        )

    def _style_of(self, entry: Entry) -> str:
        return method_style(method_of(entry), self.background_colors[1])

    @on(MessageField.Changed)
    def check_words(self) -> None:
        if any(words is not None for words in self._vocabularies):
            self._update_title()

    def _unknown_words(self) -> str:
        """The typed words that a word-level model does not know."""
        text = self.field.text
        spans = {span for words in self._vocabularies for span in unknown_words(text, words)}
        return " ".join(dict.fromkeys(text[start:stop] for start, stop in sorted(spans)))
