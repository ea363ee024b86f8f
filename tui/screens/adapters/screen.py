"""The adapters screen: browse models, prompt them, and compare their answers."""

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Resize, ScreenResume, ScreenSuspend
from textual.widget import Widget
from textual.widgets import Input, Static

from pipeline.errors import UserError
from tui.dialogs import PathScreen
from tui.screens.adapters.attention_dialog import AttentionScreen
from tui.screens.adapters.browser import BrowseScreen
from tui.screens.adapters.sampling_dialog import SamplingScreen
from tui.screens.adapters.session.catalog import Stamp
from tui.screens.adapters.session.chat_session import LOADING, Conversation, Latest
from tui.screens.adapters.session.request_queue import RequestQueue
from tui.screens.adapters.session.transcript import transcript
from tui.screens.adapters.widgets.answers import Answers
from tui.screens.adapters.widgets.engine_bar import EngineBar
from tui.screens.adapters.widgets.model_details import Details
from tui.screens.adapters.widgets.model_table import ModelTable
from tui.screens.curves.export import save
from tui.services.engine_client import EngineDied, Inference
from tui.widgets.fields import STEP, PromptInput, Slider

MAX_PROMPTS = 200  # in the saved history
STATUS_EVERY = 2.0  # seconds between status requests
FRAME = 0.05  # seconds between redraws of a streaming answer, at least
BROWSING = {"select", "filter", "sort", "reverse", "usual", "folder"}  # actions on the table
PROMPTING = {"strength", "sampling", "attention", "copy", "save"}  # actions on the answers


class AdaptersScreen(BrowseScreen):
    """Table and prompt side by side; below 110 columns one of the two."""

    NAME: ClassVar[str] = "adapters"
    CSS_PATH = "adapters.tcss"
    AUTO_FOCUS = "ModelTable"
    BINDINGS: ClassVar[list[BindingType]] = [
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
        self.add_class("-browse")
        if self.workbench.inference is None:
            self.workbench.inference = Inference(self.workbench.root)
        self.engine = self.workbench.inference
        self.conversation = Conversation(RequestQueue(self.engine, self.library, self.workbench.params_path))
        # attributes, because answers can arrive while the screen closes and queries fail
        self.prompt, self.slider, self.answers, self.bar = PromptInput(), Slider(), Answers(), EngineBar()
        self.sampling = Static(id="sampling", markup=False)
        self._probe = Latest(self._probe_once)
        self._spectra: dict[Stamp, Any] = {}

    def body(self) -> Iterable[Widget]:
        yield self.models()
        prompt = Vertical(self.prompt, self.slider, self.sampling, self.answers, id="prompt")
        yield Horizontal(self.model_details, prompt, id="below")
        yield self.bar

    def on_mount(self) -> None:
        self.prompt.remember(self.workbench.state.prompts)
        self._status_timer = self.set_interval(STATUS_EVERY, self._tick, pause=True)
        self._show_sampling()

    @on(ScreenResume)
    def _resume(self) -> None:
        self._status_timer.resume()

    @on(ScreenSuspend)
    def _pause(self) -> None:
        self._status_timer.pause()

    # views and focus

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        narrow, prompting = self.app.size.width < 110, self.has_class("-prompt")
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

    @on(ModelTable.Chosen)
    def action_prompt(self) -> None:
        self._switch_view("-prompt")
        self.give_focus(self.prompt)

    def action_browse(self) -> None:
        self._switch_view("-browse")
        self.give_focus(self.table)

    def action_leave(self) -> None:
        """Escape: interrupt the answer, else leave the prompt or the filter, else go back to the table."""
        if self._is_generating():
            self.action_interrupt()
        elif self.prompt.has_focus:
            self.give_focus(self.answers)
        elif not self.clear_filter():
            self.action_browse()

    def selection_changed(self) -> None:
        self.slider.disabled = not any(entry.model.scales for entry in self.selected_entries())

    # prompting

    @on(Input.Submitted, "PromptInput")
    def submit(self, event: Input.Submitted) -> None:
        prompt, entries = event.value.strip(), self.selected_entries()
        if not prompt:
            self.workbench.log_message("The prompt is empty. Enter at least one word.", "warning")
        elif not entries:
            self.workbench.log_message("No model is selected. Press b and select one.", "warning")
        else:
            self._remember(prompt)
            self.give_focus(self.answers)
            self._prompt_models(prompt)

    def _remember(self, prompt: str) -> None:
        others = [other for other in self.workbench.state.prompts if other != prompt]
        self.workbench.state.prompts = [*others, prompt][-MAX_PROMPTS:]
        self.prompt.remember(self.workbench.state.prompts)
        self.workbench.remember()

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
                self.workbench.log_message(
                    "Not all of these models have a chat template, so they were prompted without it.", "warning"
                )
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

    # strength

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
        if self.slider.disabled:
            self.workbench.log_message(
                "Strength scales weight changes; prefix and prompt tuning change no weights. Select another adapter."
                if any(entry.model.kind == "adapter" for entry in self.selected_entries())
                else "Strength scales an adapter's change. Select an adapter.",
                "warning",
            )
        else:
            self.slider.value += steps * STEP

    # sampling and attention

    def _show_sampling(self) -> None:
        chat = " · chat template" if self.conversation.chat else ""
        self.sampling.update(f"{self.conversation.sampling}{chat}")

    @work
    async def action_sampling(self) -> None:
        has_chat = self.conversation.requests.has_chat(self.selected_entries())
        settings = await self.app.push_screen_wait(
            SamplingScreen(self.conversation.sampling, self.conversation.chat, has_chat)
        )
        if settings:
            self.conversation.sampling, self.conversation.chat = settings
            self._show_sampling()

    def action_attention(self) -> None:
        entries, exchange = self.selected_entries(), self.conversation.newest
        if not entries or exchange is None:
            self.workbench.log_message("Attention is shown for a prompt. Enter one first.", "warning")
            return
        pointed = self.entry(self.table.pointed)
        entry = pointed if pointed in entries else entries[0]
        ask = partial(self.conversation.requests.attention, entry, exchange.prompt, self.slider.value, exchange.chat)
        self.app.push_screen(AttentionScreen(entry.label, ask))

    # copy and save

    def action_copy(self) -> None:
        if self.conversation.newest is None:
            self.workbench.log_message("There is no answer to copy yet.", "warning")
        else:
            self.app.copy_to_clipboard(self.conversation.newest.answers_text())
            self.workbench.log_message("Copied the last answer to the clipboard.")

    @work
    async def action_save(self) -> None:
        if not self.conversation.exchanges:
            self.workbench.log_message("There is nothing to save yet.", "warning")
            return
        question = "Save the transcript to which file? .jsonl gives JSON lines, any other suffix Markdown."
        name = await self.app.push_screen_wait(PathScreen(question, "transcript.md"))
        if name is None:
            return
        path = self.workbench.root / Path(name).expanduser()
        try:
            save(path, [transcript(self.conversation.exchanges, path.suffix).encode()])
        except OSError as error:
            self.workbench.fail(error)
        else:
            self.workbench.log_message(f"Saved {len(self.conversation.exchanges)} prompts to {path}.")

    # engine status and spectra

    def _set_engine_state(self, state: str) -> None:
        self.bar.state = state
        self.refresh_bindings()

    def _tick(self) -> None:
        bar = self.bar
        if self.engine.running and not self._is_generating():
            self._status()
        elif not self.engine.running and bar.state in ("ready", "busy") and not self._is_generating():
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

    def details_read(self, details: Details) -> None:
        """Measure the spectrum too, if the engine is running and idle."""
        if details.entry.model.scales and self.engine.running and not self._is_generating():
            self._measure_spectrum(details)
