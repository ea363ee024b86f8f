"""The first look: what the program is, and four ways to begin, in a folder without a project."""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from pipeline.errors import UserError
from tui.dialogs import Reader
from tui.registry import SCREENS
from tui.screens.base import WorkbenchScreen
from tui.screens.welcome.new import Creation, Made, NewProject
from tui.widgets.key_bar import KeyBar
from tui.widgets.table import VIM_KEYS

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


class Picture(Widget):
    """What LoRA does: the frozen weights W, and beside them the product of two thin matrices that
    trains.
    """

    W, B, A = 16, 2, 16  # cells
    ROWS = 5

    def render(self) -> RenderResult:
        variables = self.app.theme_variables
        frozen, trained = "dim", f"bold {variables['accent']}"
        picture = Text(no_wrap=True)
        for row in range(self.ROWS):
            middle = row == self.ROWS // 2
            picture.append("▒" * self.W, frozen).append("  +  " if middle else "     ")
            picture.append("█" * self.B, trained).append("  ·  " if middle else "     ")
            picture.append(("█" if middle else " ") * self.A, trained).append("\n")
        names = ("W  frozen".center(self.W), "B".center(self.B), "A  trained".center(self.A))
        picture.append((" " * 5).join(names), frozen)
        return picture


class Choices(OptionList):
    """The ways to begin; arrows and Enter, or the letter."""

    BINDINGS: ClassVar[list[BindingType]] = [*VIM_KEYS]


class WelcomeScreen(WorkbenchScreen):
    """Four ways to begin."""

    NAME = "welcome"
    HELP = (
        "There is no project in this folder. A project is a folder with a params.yaml, which says "
        "what is trained on what, and a dvc.yaml, which says in which steps. Make one, look at the "
        "demo, or calculate without one."
    )
    CSS_PATH = "welcome.tcss"
    AUTO_FOCUS = "Choices"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "begin('new')", "New project", id="welcome.new", show=False),
        Binding("p", "begin('minigpt')", "MiniGPT's project", id="welcome.minigpt", show=False),
        Binding("d", "begin('demo')", "Demo", id="welcome.demo", show=False),
    ]

    def compose(self) -> ComposeResult:
        """No header: there is no project whose state it could show."""
        yield from self.body()
        yield KeyBar()

    def body(self) -> Iterable[Widget]:
        with VerticalScroll(id="welcome"):
            yield Picture()
            yield Static("LoRA workbench", id="name")
            yield Static(
                "Adapt a language model to your data; see what it learns and forgets.", id="what"
            )
            yield Static(self._missing(), id="where", markup=False)
            yield Choices(*(Option(_line(name), id=name) for name in CHOICES), markup=False)
            yield Static(id="doing", markup=False)

    def _missing(self) -> str:
        params = self.workbench.params_path
        return (
            f"There is no {params.name} in {self.workbench.folder_label}. How do you want to begin?"
        )

    @on(OptionList.OptionSelected)
    def chosen(self, event: OptionList.OptionSelected) -> None:
        self.action_begin(str(event.option_id))

    def action_begin(self, choice: str) -> None:
        if choice == "calculate":
            self.workbench.switch_mode(CALCULATOR)
        elif choice == "new":
            self.workbench.push_screen(NewProject(self.workbench.root), self._created)
        elif choice == "minigpt":
            self.workbench.push_screen(Creation([MINIGPT], self.workbench.root), self._created)
        else:
            self._open_demo()

    def _created(self, made: Made | None) -> None:
        if made:
            params, report = made
            self._open(params, f"{params.parent.name} is made. R runs it.", report)

    @work(group="open", exclusive=True)
    async def _open(self, params: Path, greeting: str, report: str = "") -> None:
        await self.workbench.open_project(params, greeting)
        if report:
            self.workbench.push_screen(Reader(Text(report), title="What was chosen, and why"))

    @work(group="demo", exclusive=True, thread=True)
    def _open_demo(self) -> None:
        from tui.services.projects.demo import greet, open_demo

        self.app.call_from_thread(self._say, "unpacking the demo …")
        try:
            params = open_demo()
        except UserError as error:
            self.app.call_from_thread(self.workbench.fail, error)
        else:
            self.app.call_from_thread(self._open, params, greet(params.parent))
        self.app.call_from_thread(self._say, "")

    def _say(self, text: str) -> None:
        self.query_one("#doing", Static).update(text)


def _line(choice: str) -> Text:
    key, name, what = CHOICES[choice]
    return Text.assemble((f" {key} ", "reverse bold"), f"  {name}\n", (f"     {what}", "dim"))
