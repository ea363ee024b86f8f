"""The prompt's pane: what it asks the models, how strong an adapter is, the answers, the state of
the engine.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from time import monotonic

from textual import on, work
from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Input, Static

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.async_worker import WorkerDied
from pipeline.files.home import expand
from pipeline.views.model_library import Entry
from tui.app import Workbench
from tui.dialogs import PathScreen
from tui.screens.models.answers import Answers
from tui.screens.models.attention import AttentionScreen
from tui.screens.models.columns import look_name
from tui.screens.models.conversation import LOADING, Conversation, transcript
from tui.services.loaded_models import Latest, LoadedModels
from tui.services.vocabulary import unknown_words
from tui.widgets.colors import method_look, method_style
from tui.widgets.pane import Pane
from tui.widgets.prompting import AS_TRAINED, EngineBar, PromptInput, Slider
from tui.widgets.sampling import SamplingScreen

SAVE_QUESTION = (
    "Save the transcript to which file? .jsonl gives JSON lines, any other suffix Markdown."
)
MAX_TITLES = 4  # names of models in the title
FRAME = 0.05  # seconds between redraws of a streaming answer, at least
STATUS_EVERY = 2.0  # seconds between status requests


class PromptPane(Pane):
    TITLE = "Prompt"
    HELP = (
        "Enter asks all chosen models, or the one under the cursor. The table has the most likely "
        "next tokens of each, in percent, and how that differs from the first; below are the "
        "answers.\n"
        "\n"
        "`[` and `]` weaken and strengthen an adapter: ×0 is its base, ×1 the adapter as trained. "
        "The table follows at once; answers from another strength are marked until Ctrl+R asks "
        "again. Underlined words are not in the vocabulary. `a` shows where the model looks."
    )

    def __init__(self, models: LoadedModels) -> None:
        super().__init__(id="prompt")
        self.engine, self.conversation = models.inference, Conversation(models)
        self._next_status = 0.0  # when the engine's state is asked for
        self.saved = 0  # exchanges in the last transcript
        self._probe = Latest(self._probe_once)
        self.prompt, self.slider, self.answers, self.bar = (
            PromptInput(),
            Slider(),
            Answers(),
            EngineBar(),
        )
        self.sampling = Static(id="sampling", markup=False)
        self._unknown = Static(id="unknown", markup=False)
        # by the name of the model, if it knows words only
        self._vocabularies: Mapping[str, Collection[str]] = {}

    def contents(self) -> Iterable[Widget]:
        yield self.prompt
        yield self._unknown
        yield Horizontal(self.slider, self.sampling, id="settings")
        yield self.answers
        yield self.bar

    def on_mount(self) -> None:
        self._show_sampling()

    @property
    def _workbench(self) -> Workbench:
        assert isinstance(self.app, Workbench)
        return self.app

    def _warn(self, text: str) -> None:
        self._workbench.log_message(text, "warning")

    def show_models(self, names: Sequence[str]) -> None:
        """The models that a prompt goes to."""
        more = f" and {len(names) - MAX_TITLES} more" if len(names) > MAX_TITLES else ""
        self.show_title(*[", ".join(names[:MAX_TITLES]) + more] * bool(names))

    def know(self, vocabularies: Mapping[str, Collection[str]]) -> None:
        """Mark words from now on that one of these does not have."""
        self._vocabularies = vocabularies
        self.prompt.mark(
            lambda text: [
                span for words in vocabularies.values() for span in unknown_words(text, words)
            ]
        )
        self._show_unknown(self.prompt.value)

    @on(Input.Changed, "PromptInput")
    def _check_words(self, event: Input.Changed) -> None:
        self._show_unknown(event.value)

    def _show_unknown(self, text: str) -> None:
        """Say once which words are unknown, and to which of several models."""
        missing: dict[str, list[str]] = {}
        for name, words in self._vocabularies.items():
            for start, stop in unknown_words(text, words):
                missing.setdefault(text[start:stop], []).append(name)
        parts = [
            word if len(names) == len(self._vocabularies) else f"{word} ({', '.join(names[:3])})"
            for word, names in missing.items()
        ]
        self._unknown.update(f"not in the vocabulary: {', '.join(parts)}")
        self._unknown.display = bool(parts)

    @work(exclusive=True, group="ask")
    async def ask(self, prompt: str, entries: Sequence[Entry]) -> None:
        self._set_engine_state("busy" if self.engine.running else "starting")
        earlier = list(self.conversation.exchanges)
        exchange = self.conversation.begin(prompt, entries, self.slider.value)
        methods = {entry.label: look_name(entry) for entry in entries}
        background = self.background_colors[1]
        looks = {
            label: (method_look(name).sign, method_style(name, background))
            for label, name in methods.items()
        }
        await self.answers.start(exchange, earlier, looks)
        try:
            async with aclosing(self.conversation.answers(exchange)) as changes:
                drawn_at = 0.0
                async for _ in changes:
                    loading = [
                        answer.name for answer in exchange.answers if answer.ended == LOADING
                    ]
                    # a load yields nothing until it is done
                    if loading or monotonic() - drawn_at >= FRAME:
                        state = "loading" if loading else "busy"
                        self._set_engine_state(
                            state if self.engine.running else "starting", *loading[:1]
                        )
                        self.answers.show(exchange, self.slider.value)
                        drawn_at = monotonic()
                    # tokens may arrive faster than they are drawn: let keys through
                    await asyncio.sleep(0)
        except UserError as error:
            self._show_error(error)
        else:
            self._set_engine_state("ready")
            self._status()
            if self.conversation.chat and not exchange.chat:
                self._warn(
                    "Not all of these models have a chat template, so they were prompted without "
                    "it."
                )
        finally:
            if self.is_attached:  # else the program is closing
                self.answers.show(exchange, self.slider.value)
                self.call_later(self.screen.refresh_bindings)

    def _show_error(self, error: UserError) -> None:
        self._set_engine_state("died" if isinstance(error, WorkerDied) else "ready")
        self._workbench.fail(error)

    def is_generating(self) -> bool:
        return any(
            worker.group == "ask" and worker.is_running and worker.node is self
            for worker in self.workers
        )

    def interrupt(self) -> None:
        self.workers.cancel_group(self, "ask")
        self._set_engine_state("ready" if self.engine.running else "not started")

    # Strength, sampling, attention

    @on(Slider.Changed)
    def move(self) -> None:
        self.answers.mark_stale(self.slider.value)
        if self.engine.running and self.conversation.newest:
            self.run_worker(self._probe.run(), group="probe")

    async def _probe_once(self) -> None:
        try:
            self.answers.show_table(await self.conversation.probe(self.slider.value))
        except UserError as error:
            self._show_error(error)

    def _show_sampling(self) -> None:
        chat = " · chat template" if self.conversation.chat else ""
        self.sampling.update(f"{self.conversation.sampling}{chat}")

    @work
    async def edit_sampling(self, entries: Sequence[Entry]) -> None:
        has_chat = self.conversation.models.has_chat(entries)
        settings = await self.app.push_screen_wait(
            SamplingScreen(self.conversation.sampling, self.conversation.chat, has_chat)
        )
        if settings:
            self.conversation.sampling, self.conversation.chat = settings
            self._show_sampling()

    def show_attention(self, entries: Sequence[Entry], pointed: Entry | None) -> None:
        """Attention over the newest prompt: of the model under the cursor if it is chosen, else of
        an adapter.
        """
        exchange = self.conversation.newest
        if not entries or exchange is None:
            self._warn("Attention is shown for a prompt. Enter one first.")
            return
        adapters = [entry for entry in entries if entry.model.kind == "adapter"]
        entry = next(
            (entry for entry in entries if entry == pointed), (adapters or list(entries))[0]
        )
        ask = partial(self.conversation.attention, entry, exchange)
        strength = self.slider.value if entry.model.scales else AS_TRAINED
        self.app.push_screen(
            AttentionScreen(entry.label, entry.model.kind == "adapter", strength, ask)
        )

    # Copy and save

    def copy_answer(self) -> None:
        if self.conversation.newest is None:
            self._warn("There is no answer to copy yet.")
        else:
            self.app.copy_to_clipboard(self.conversation.newest.answers_text())
            self._workbench.log_message("Copied the last answer to the clipboard.")

    @work
    async def save(self) -> None:
        if not self.conversation.exchanges:
            self._warn("There is nothing to save yet.")
            return
        name = await self.app.push_screen_wait(PathScreen(SAVE_QUESTION, "transcript.md"))
        if name is None:
            return
        path = self._workbench.root / expand(name)
        with self._workbench.errors_shown():
            write_file(path, transcript(self.conversation.exchanges, path.suffix), durable=True)
            self.saved = len(self.conversation.exchanges)
            self._workbench.log_message(f"Saved {self.saved} prompts to {path}.")

    # The engine

    def _set_engine_state(self, state: str, model: str = "") -> None:
        waits = {
            "starting": "starting the engine (importing libraries)",
            "loading": f"loading {model}".strip(),
        }
        self.answers.wait_for(waits.get(state, ""))
        if state != self.bar.state:  # else the keys would be collected anew at every status request
            self.bar.state = state
            self.screen.refresh_bindings()

    @work(group="start")
    async def start_engine(self) -> None:
        """Start the process before the first prompt needs it: importing libraries takes seconds."""
        if self.bar.state == "not started":
            self._set_engine_state("starting")
            try:
                self.bar.facts = await self.engine.ask("status")
            except UserError as error:
                self._show_error(error)
            else:
                if not self.is_generating():
                    self._set_engine_state("ready")

    def tick(self) -> None:
        """Ask for the engine's state, every STATUS_EVERY seconds."""
        if not self.screen.is_current or self.is_generating() or self.bar.state == "starting":
            return
        if monotonic() < self._next_status:
            return
        self._next_status = monotonic() + STATUS_EVERY
        if self.engine.running:
            self._status()
        elif self.bar.state in ("ready", "busy"):
            self._set_engine_state("died")

    @work(exclusive=True, group="status")
    async def _status(self) -> None:
        # it ended before this worker began, and asking would start a new one
        if not self.engine.running:
            self._set_engine_state("died")
            return
        try:
            self.bar.facts = await self.engine.ask("status")
        except UserError:
            self._set_engine_state("died")
        else:
            if not self.is_generating():
                self._set_engine_state("ready")
