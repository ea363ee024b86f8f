"""The app on its screen of models, with a fake engine that answers immediately or the real one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Static

from pipeline.views.model_library import Entry
from tests.helpers.fake_engine import FakeInference
from tests.helpers.pilot import AppSession, until
from tui.app import Workbench
from tui.screens.models.answers import Completions, TopK
from tui.screens.models.conversation import Conversation
from tui.screens.models.details import format_details
from tui.screens.models.screen import ModelsScreen
from tui.screens.models.table import ModelTable
from tui.widgets.prompting import EngineBar, PromptInput

USUAL = ["base", "expanded", "scratch", "full", "freeze", "lora", "merged", "prefix", "prompt"]
LISTED = [*USUAL, "sweep/", "sweep/rank-1", "sweep/rank-2"]
COUNT = len(USUAL) + 2  # models of the brief project


class Session(AppSession[ModelsScreen]):
    """The app on its screen of models, with helpers for tests."""

    kind = ModelsScreen

    def __init__(self, pilot: Pilot[None], engine: FakeInference | None = None) -> None:
        super().__init__(pilot)
        self.engine = engine or FakeInference()

    @property
    def table(self) -> ModelTable:
        return self.screen.query_one(ModelTable)

    def rows(self) -> list[str]:
        return self.table.texts()

    def names(self) -> list[str]:
        """The labels of the models that are listed, and of folders their names with a slash."""
        lines = self.table._lines
        return [line.label if isinstance(line, Entry) else f"{line.name}/" for line in lines]

    def header(self) -> list[str]:
        return self.table._header().plain.split()

    def nothing(self) -> str:
        return str(self.screen.query_one("#none", Static).render())

    def shown_details(self) -> str:
        return str(self.screen.query_one("ModelDetails Lines").render())

    def row(self, name: str) -> str:
        return self.rows()[self.names().index(name)]

    @property
    def conversation(self) -> Conversation:
        return self.screen.prompt_pane.conversation

    def is_generating(self) -> bool:
        return self.screen.prompt_pane.is_generating()

    def completions(self, shown: bool = False) -> str:
        """The answers, or only those that are shown."""
        children = self.screen.query_one(Completions).children
        return "\n".join(str(child.render()) for child in children if child.display or not shown)

    @property
    def bar(self) -> EngineBar:
        return self.screen.query_one(EngineBar)

    def text(self, kind: type[TopK]) -> str:
        return str(self.screen.query_one(kind).render())

    async def ask(self, prompt: str) -> None:
        self.screen.action_prompt()
        self.screen.query_one(PromptInput).value = prompt
        await self.press("enter")

    async def answered(self) -> None:
        await until(
            self.pilot, lambda: self.conversation.newest is not None and not self.is_generating()
        )

    async def checked(self, count: int) -> None:
        def all_checked() -> bool:
            entries = self.screen.entries
            return len(entries) == count and all(entry.verdict for entry in entries)

        await until(self.pilot, all_checked)

    async def point(self, name: str) -> None:
        entry = next(entry for entry in self.screen.entries if entry.label == name)
        assert self.table.point(entry.model.path)
        await until(
            self.pilot,
            lambda: bool(self.screen.details and self.screen.details.entry.label == name),
        )

    def details(self) -> str:
        assert self.screen.details is not None
        return "\n".join(line.plain for line in format_details(self.screen.details, 100))


@asynccontextmanager
async def open_models(
    root: Path, count: int = COUNT, size: tuple[int, int] = (80, 24), **engine: Any
) -> AsyncIterator[Session]:
    app = Workbench(root / "params.yaml")
    app.first_screen = "models"
    app.inference = fake = FakeInference(**engine)
    async with app.run_test(size=size) as pilot:
        session = Session(pilot, fake)
        await session.checked(count)
        yield session


@asynccontextmanager
async def real_models(root: Path, count: int = COUNT) -> AsyncIterator[Session]:
    """With the real inference process."""
    app = Workbench(root / "params.yaml")
    app.first_screen = "models"
    async with app.run_test(size=(120, 40)) as pilot:
        session = Session(pilot)
        await session.checked(count)
        yield session
