"""The line of the process that runs the models: its state, and what it says of itself."""

from collections.abc import Sequence

from textual import work
from textual.content import Content
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.files.text import in_units
from pipeline.inference.talk import Answer
from tui.app import Workbench
from tui.panes.lines import MUTED
from tui.panes.text import say
from tui.services.engine_client import Inference

NOT_STARTED, STARTING, READY = "not started", "starting", "ready"
BUSY, DIED = "busy", "died"
STATES = {  # sign, style, hint
    NOT_STARTED: ("○", "", "the first prompt starts it"),
    STARTING: ("◌", "", "importing libraries"),
    READY: ("●", "$success", ""),
    BUSY: ("◐", "", "Esc interrupts"),
    DIED: ("✗", "$error", "ask again to start a new one"),
}


class EngineLine(Static):
    """Its state is found when it is shown: each second, and as answers arrive."""

    def __init__(self, workbench: Workbench, engine: Inference) -> None:
        super().__init__(id="engine", markup=False)
        self._workbench, self._engine = workbench, engine
        self.answers: Sequence[Answer] = ()  # to the last message
        self.facts: str | None = None  # None: it was not asked; "": it has not answered yet

    def on_mount(self) -> None:
        self.show()

    @property
    def state(self) -> str:
        is_busy = any(answer.unfinished for answer in self.answers)
        if self._engine.running and is_busy:
            return BUSY
        if self._engine.running and self.facts:
            return READY
        if is_busy or self._engine.running or self.facts == "":
            return STARTING
        return NOT_STARTED if self.facts is None else DIED

    def show(self) -> None:
        sign, style, hint = STATES[self.state]
        facts = [f" · {fact}" for fact in (hint, self.facts) if fact]
        name = f"{sign} engine {self.state}", style
        say(self, Content.assemble(name, ("".join(facts), MUTED)))

    def start(self) -> None:
        """Start the process before the first question: importing libraries takes seconds."""
        if self.facts is None:
            self.ask()

    @work(exclusive=True, group="status")
    async def ask(self) -> None:
        """Ask what it runs on, and what it has loaded."""
        self.facts = self.facts or ""
        self.show()
        try:
            facts = await self._engine.ask("status")
        except UserError as error:
            self._workbench.fail(error)
            self.facts = str(error)
        else:
            memory = f"{in_units(facts['memory_used'])} of {in_units(facts['memory_total'])}"
            count = len(facts["loaded"])
            models = f"{count} model{'s' * (count != 1)}"
            self.facts = " · ".join([facts["device"], memory, models, facts["name"]])
        self.show()
