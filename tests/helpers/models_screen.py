"""The app on its screen of models, with a fake engine that answers immediately or the real one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from pipeline.inference.talk import Answer
from pipeline.views.model_library import Entry
from tests.helpers.fake_engine import FakeInference
from tests.helpers.pilot import AppSession, drawn, until
from tui.app import Workbench
from tui.panes.table import Table
from tui.screens.models.columns import Folder, Line
from tui.screens.models.details import detail_lines
from tui.screens.models.screen import ModelsScreen

USUAL = ["base", "expanded", "scratch", "full", "freeze", "lora", "merged", "prefix", "prompt"]
LISTED = [*USUAL, "sweep/", "sweep/rank-1", "sweep/rank-2"]
COUNT = len(USUAL) + 2  # models of the brief project


class Session(AppSession[ModelsScreen]):
    """The app on its screen of models, with helpers for tests."""

    kind = ModelsScreen

    async def press(self, *keys: str) -> None:
        """Press keys, and wait until what changed is drawn."""
        await super().press(*keys)
        await drawn(self.pilot)

    def __init__(self, pilot: Pilot[None], engine: FakeInference | None = None) -> None:
        super().__init__(pilot)
        self.engine = engine or FakeInference()

    @property
    def table(self) -> Table[Line]:
        return self.screen.table

    def rows(self) -> list[str]:
        return self.table.texts()

    def names(self) -> list[str]:
        """The labels of the models that are listed, and of folders their names with a slash."""
        lines = self.table.shown
        return [f"{line.label}/" if isinstance(line, Folder) else line.label for line in lines]

    def pointed(self) -> str:
        line = self.table.pointed
        return line.label if isinstance(line, Entry) else ""

    def header(self) -> list[str]:
        return self.table.head().plain.split()

    def shown_details(self) -> str:
        return self.screen.details_pane.text.plain

    def row(self, name: str) -> str:
        return self.rows()[self.names().index(name)]

    @property
    def answers(self) -> list[Answer]:
        """Those to the last prompt."""
        turns = self.screen.talk.turns
        return turns[-1].reply.answers if turns else []

    def is_generating(self) -> bool:
        return self.screen.is_writing()

    def completions(self) -> str:
        """The answers to the last prompt as they are shown."""
        texts = self.screen.history.views[-1].replied.texts
        return "\n".join(str(text.render()) for text in texts)

    def engine_line(self) -> str:
        return str(self.screen.engine_line.render())

    def top_k(self) -> list[str]:
        """The table of next tokens: its head, then a line per token."""
        table = self.screen.history.views[-1].table
        return [table.head().plain, *table.texts()] if table.display else []

    async def ask(self, prompt: str) -> None:
        self.screen.action_prompt()
        self.screen.field.fill(prompt)
        await self.press("enter")

    async def answered(self) -> None:
        await until(self.pilot, lambda: self.answers and not self.is_generating())

    async def checked(self, count: int) -> None:
        def all_checked() -> bool:
            entries = self.screen.table.entries
            return len(entries) == count and all(entry.verdict for entry in entries)

        await until(self.pilot, all_checked)

    async def point(self, name: str) -> None:
        entry = next(entry for entry in self.screen.table.entries if entry.label == name)
        assert self.table.point(entry.model.path)
        await until(
            self.pilot,
            lambda: bool(
                self.screen.details_pane.details
                and self.screen.details_pane.details.entry.label == name
            ),
        )

    def details(self) -> str:
        assert self.screen.details_pane.details is not None
        return "\n".join(line.plain for line in detail_lines(self.screen.details_pane.details))


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
