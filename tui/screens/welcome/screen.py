"""The first look: what the program is, and four ways to begin, in a folder without a project."""

import asyncio
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from tui.dialogs import Reader
from tui.panes.key_bar import KeyBar
from tui.panes.lines import wrapped
from tui.registry import SCREENS
from tui.screens.base import WorkbenchScreen
from tui.screens.welcome.new import Made, NewProject, create

MINIGPT = "minigpt"  # the folder of its project
CALCULATOR = "calculator"
NUMBER = str(list(SCREENS).index(CALCULATOR) + 1)  # its key on all screens
CHOICES = {  # action → key, name, what it is
    "new": ("n", "New project", "your model and data, settings chosen with reasons"),
    "minigpt": ("p", "MiniGPT", "a tiny model of our own, trained in half a minute"),
    "demo": ("d", "Demo", "a small finished project, nothing to wait for"),
    "calculate": (
        NUMBER,
        SCREENS[CALCULATOR].label,
        "what a model takes to train, without a project",
    ),
}
WHAT = "Adapt a language model to your data; see what it learns and forgets."
# What LoRA does: beside the frozen weights W, the product of two thin matrices that trains.
PICTURE = """\
[dim]▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒[/]     [bold $accent]██[/]
[dim]▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒[/]     [bold $accent]██[/]
[dim]▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒  +  [/][bold $accent]██  ·  ████████████████[/]
[dim]▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒[/]     [bold $accent]██[/]
[dim]▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒[/]     [bold $accent]██[/]
[dim]   W  frozen         B         A  trained   [/]"""


class WelcomeScreen(WorkbenchScreen):
    """Four ways to begin."""

    NAME = "welcome"
    HELP = (
        "There is no project in this folder. A project is a folder with a params.yaml, which says "
        "what is trained on what, and a dvc.yaml, which says in which steps. Make one, look at the "
        "demo, or calculate without one."
    )
    CSS_PATH = "welcome.tcss"
    AUTO_FOCUS = "OptionList"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "begin('new')", "New project", id="welcome.new", show=False),
        Binding("p", "begin('minigpt')", "MiniGPT's project", id="welcome.minigpt", show=False),
        Binding("d", "begin('demo')", "Demo", id="welcome.demo", show=False),
        Binding("j", "focused.cursor_down", "Down", show=False),
        Binding("k", "focused.cursor_up", "Up", show=False),
    ]

    def compose(self) -> ComposeResult:
        """No header: there is no project whose state it could show."""
        yield from self.body()
        yield KeyBar()

    def body(self) -> Iterable[Widget]:
        params = self.workbench.params_path
        with VerticalScroll(id="welcome"):
            yield Static(PICTURE, id="picture")
            yield Static("LoRA workbench", id="name")
            yield Static(WHAT, id="what")
            where = f"There is no {params.name} in {self.workbench.folder_label}. "
            yield Static(f"{where}How do you want to begin?", id="where", markup=False)
            yield OptionList(*map(_option, CHOICES))

    @on(OptionList.OptionSelected)
    def chosen(self, event: OptionList.OptionSelected) -> None:
        self.action_begin(str(event.option_id))

    def action_begin(self, choice: str) -> None:
        root = self.workbench.root
        match choice:
            case "calculate":
                self.workbench.switch_mode(CALCULATOR)
            case "new":
                self.workbench.push_screen(NewProject(root), self._created)
            case "minigpt":
                self._make_minigpt()
            case "demo":
                self._open_demo()

    def _created(self, made: Made | None) -> None:
        if made:
            params, report = made
            self._open(params, f"{params.parent.name} is made. R runs it.", report)

    @work(group="open", exclusive=True)
    async def _open(self, params: Path, greeting: str, report: str = "") -> None:
        await self.workbench.open_project(params, greeting)
        if report:
            reader = Reader(partial(_fitted, report), "What was chosen, and why")
            self.workbench.push_screen(reader)

    @work(group="make", exclusive=True)
    async def _make_minigpt(self) -> None:
        self.workbench.log_message("Making MiniGPT's project …")
        with self.workbench.errors_shown():
            self._created(await create(self.workbench.root, MINIGPT))

    @work(group="make", exclusive=True)
    async def _open_demo(self) -> None:
        from tui.services.projects.demo import greet, open_demo

        self.workbench.log_message("Unpacking the demo …")
        with self.workbench.errors_shown():
            params = await asyncio.to_thread(open_demo)
            self._open(params, greet(params.parent))


def _fitted(report: str, width: int) -> Iterable[Content]:
    return [part for line in report.splitlines() for part in wrapped(Content(line), width)]


def _option(choice: str) -> Option:
    key, name, what = CHOICES[choice]
    return Option(f"[reverse bold] {key} [/]  {name}\n[dim]     {what}[/]", id=choice)
