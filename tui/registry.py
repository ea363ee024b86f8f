"""The screens, in the order of their keys. A screen is imported when it is first shown."""

from pkgutil import resolve_name
from typing import Any, NamedTuple

from textual.screen import Screen


class ScreenEntry(NamedTuple):
    """A screen: its label in the header, a shorter one for a narrow terminal, and its class as
    `module:class`.
    """

    label: str
    short: str
    source: str

    @property
    def kind(self) -> Any:
        """The class."""
        return resolve_name(self.source)

    def load(self) -> Screen[None]:
        screen: Screen[None] = self.kind()
        return screen


SCREENS = {
    "pipeline": ScreenEntry("Pipeline", "Pipe", "tui.screens.pipeline.screen:PipelineScreen"),
    "curves": ScreenEntry("Curves", "Curves", "tui.screens.curves.screen:CurvesScreen"),
    "results": ScreenEntry("Results", "Results", "tui.screens.results.screen:ResultsScreen"),
    "data": ScreenEntry("Data", "Data", "tui.screens.data.screen:DataScreen"),
    "models": ScreenEntry("Models", "Models", "tui.screens.models.screen:ModelsScreen"),
    "chat": ScreenEntry("Chat", "Chat", "tui.screens.chat.screen:ChatScreen"),
    "calculator": ScreenEntry(
        "Calculator", "Calc", "tui.screens.calculator.screen:CalculatorScreen"
    ),
    "monitor": ScreenEntry("Monitor", "Mon", "tui.screens.monitor.screen:MonitorScreen"),
}

# shown in a folder without a project; no number leads to it
WELCOME = "welcome"
FIRST_LOOK = ScreenEntry("Welcome", "Welcome", "tui.screens.welcome.screen:WelcomeScreen")
