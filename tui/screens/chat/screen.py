"""The chat: several turns with one model, or with two side by side."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual import work
from textual.binding import Binding, BindingType

from tui.screens.conversation.sampling import Sampling
from tui.screens.conversation.screen import STYLES, ConversationScreen

MOST_MODELS = 2  # side by side


class ChatScreen(ConversationScreen):
    """A conversation stays when another screen is shown."""

    NAME = "chat"
    SAMPLING = Sampling(limit=512, k=0)
    EMPTY = """\
Type a message below; Enter asks. A model without a chat template goes on with the text.

Ctrl+O    the model, or two side by side
Ctrl+↑ ↓  strength of adapters
Ctrl+L    system prompt and sampling
Ctrl+T    thoughts of reasoning models, shown or folded
Ctrl+G    correct an answer: it becomes a row of training data
Ctrl+S    save the conversation as text or as data"""
    HELP = """\
Talk to one model, or to two side by side: each reads the same messages and its own answers.
Nothing that was said is lost: an edited message and an answer that was asked again begin a branch.
An answer can become a row of training data (Ctrl+G), the conversation a file (Ctrl+S)."""
    CSS_PATH: ClassVar[Any] = STYLES
    AUTO_FOCUS = "MessageField"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+o", "models", "Models", id="chat.models"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._wanted: Sequence[Path] = ()  # by another screen; else one is chosen here

    def on_mount(self) -> None:
        self._choose()
        self.engine_line.start()

    def open_with(self, models: Sequence[Path | str] = (), **_: Any) -> None:
        """Chat with these models."""
        if len(models) > MOST_MODELS:
            self.warn(f"Chat has room for {MOST_MODELS} models, so the others were left out.")
        if models:
            self._wanted = [Path(path) for path in models[:MOST_MODELS]]
            self._choose()
        self.give_focus(self.field)

    def project_changed(self) -> None:
        if not self.session.entries and not self._wanted:
            self._choose()

    @work(exclusive=True, group="use")
    async def _choose(self) -> None:
        """Chat with the wanted models, else with the pipeline's first adapter."""
        self.search_folders()
        scan = self.session.models.library.scan
        found = {entry.model.path: entry for entry in await asyncio.to_thread(lambda: [*scan()])}
        chosen = [found[path] for path in self._wanted if path in found]
        for path in self._wanted:
            if path not in found:
                self.warn(f"{path} is not a model folder. Choose another model (Ctrl+O).")
        if not self._wanted:
            entries = sorted(found.values(), key=lambda entry: entry.sort_key)
            adapters = [entry for entry in entries if entry.model.kind == "adapter"]
            chosen = [*adapters, *entries][:1]
        if chosen:
            await self.use(chosen)

    def action_models(self) -> None:
        """Choose others on their screen."""
        chosen = [entry.model.path for entry in self.session.entries]
        self.workbench.go("models", chosen=chosen)
