"""The chat: several turns with one model, or with two side by side."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.widget import Widget

from pipeline.views.model_library import Entry
from pipeline.views.models import describe
from tui.screens.chat.picker import MOST_MODELS, ModelPicker
from tui.screens.conversation.screen import STYLES, ConversationScreen
from tui.services.loaded_models import Sampling


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
    CSS_PATH: ClassVar[Any] = [STYLES, "chat.tcss"]
    AUTO_FOCUS = "MessageField"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+o", "models", "Models", id="chat.models"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []  # that can be chosen
        self._are_given = False  # by another screen, so that none is chosen here

    def body(self) -> Iterable[Widget]:
        yield from self.conversation()

    def on_mount(self) -> None:
        self._find_models()
        self.engine_line.start()

    def open_with(self, models: Sequence[Path | str] = (), prompt: str = "", **_: Any) -> None:
        """Chat with these models; `prompt` is put into the field."""
        if models:
            self._are_given = True
            self._use_paths([Path(path) for path in models[:MOST_MODELS]])
        if prompt:
            self.field.fill(prompt)
        self.give_focus(self.field)

    def project_changed(self) -> None:
        if not self.session.entries:
            self._find_models()

    # Models

    @work(exclusive=True, group="find")
    async def _find_models(self) -> None:
        """List the models, the pipeline's own first; without a choice, chat with its first
        adapter.
        """
        self.search_folders()
        library = self.session.models.library
        entries = await asyncio.to_thread(lambda: [*library.scan()])
        self.entries = sorted(entries, key=lambda entry: entry.sort_key)
        if not self.session.entries and self.entries and not self._are_given:
            adapters = (entry for entry in self.entries if entry.model.kind == "adapter")
            await self.use([next(adapters, self.entries[0])])

    @work(exclusive=True, group="use")
    async def _use_paths(self, paths: Sequence[Path]) -> None:
        """Chat with the models in these folders, also if they were not found yet."""
        library, chosen = self.session.models.library, list[Entry]()
        for folder in paths:
            if folder.is_dir():
                model = await asyncio.to_thread(describe, folder)
                chosen.append(Entry(library.label(folder), model, None, group=folder.parent.name))
            else:
                self.warn(f"{folder} is not a model folder. Choose another model (Ctrl+O).")
        if chosen:
            await self.use(chosen)

    @work(group="ask-user")
    async def action_models(self) -> None:
        await self._find_models().wait()  # some may have been trained since
        if not self.entries:
            self.warn(self.NO_MODELS)
            return
        chosen = [entry.model.path for entry in self.session.entries]
        paths = await self.app.push_screen_wait(ModelPicker(self.entries, chosen))
        if paths:
            self._use_paths(paths)
