"""The line of the process that runs the models: its state, and what it says of itself."""

import time

from textual import work
from textual.content import Content
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.files.text import in_units
from tui.app import Workbench
from tui.panes.lines import MUTED
from tui.panes.text import say
from tui.services.engine_client import Inference

NOT_STARTED, STARTING, READY = "not started", "starting", "ready"
LOADING, BUSY, DIED = "loading", "busy", "died"
REST = 5.0  # seconds between two questions while nothing happens
STATES = {  # sign, style, hint
    NOT_STARTED: ("○", "", "the first prompt starts it"),
    STARTING: ("◌", "", "importing libraries"),
    READY: ("●", "$success", ""),
    LOADING: ("◌", "", "Esc interrupts"),
    BUSY: ("◐", "", "Esc interrupts"),
    DIED: ("✗", "$error", "ask again to start a new one"),
}


class EngineLine(Static):
    """Those who ask the process tell its state; in between the line looks itself."""

    def __init__(self, workbench: Workbench, engine: Inference) -> None:
        super().__init__(id="engine", markup=False)
        self._workbench, self._engine = workbench, engine
        self.facts, self.state = "", NOT_STARTED
        self._asked = 0.0  # when, by the monotonic clock

    def on_mount(self) -> None:
        self.show(NOT_STARTED)

    def show(self, state: str, model: str = "") -> None:
        if state != self.state:
            self.state, self._asked = state, 0.0
        sign, style, hint = STATES[state]
        name = f"{sign} engine {state} {model}".rstrip()
        facts = [f" · {fact}" for fact in (hint, self.facts) if fact]
        say(self, Content.assemble((name, style), ("".join(facts), MUTED)))

    def start(self) -> None:
        """Start the process before the first question: importing libraries takes seconds."""
        if self.state == NOT_STARTED:
            self._ask()

    def look(self) -> None:
        """See whether it still runs, and what it says, unless it is at work."""
        if self._engine.running and self.state in (NOT_STARTED, READY, DIED):
            if time.monotonic() - self._asked > REST:
                self._ask()
        elif self.state == READY:
            self.show(DIED)

    @work(exclusive=True, group="status")
    async def _ask(self) -> None:
        if not self._engine.running:
            self.show(STARTING)
        try:
            facts = await self._engine.ask("status")
        except UserError as error:
            self.show(DIED)
            self._workbench.fail(error)
            return
        memory = f"{in_units(facts['memory_used'])} of {in_units(facts['memory_total'])}"
        count = len(facts["loaded"])
        models = f"{count} model{'s' * (count != 1)}"
        self.facts = " · ".join([facts["device"], memory, models, facts["name"]])
        if self.state not in (LOADING, BUSY):
            self.show(READY)
            self._asked = time.monotonic()
