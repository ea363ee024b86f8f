"""The screens, in the order of their keys. A screen is imported when it is first shown."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Protocol

from textual.binding import ActiveBinding
from textual.screen import Screen


class NumberedScreen(Protocol):
    """What the app and the palette know of a screen; `tui.screens.base` says what each means."""

    NAME: ClassVar[str]
    HELP: ClassVar[str]
    is_mounted: bool

    @property
    def focused_pane(self) -> Any: ...

    @property
    def active_bindings(self) -> dict[str, ActiveBinding]: ...

    def query(self, selector: Any) -> Any: ...

    def open_with(self, **request: Any) -> None: ...

    def unsaved(self) -> str: ...

    def notice(self) -> None: ...

    def tick(self) -> None: ...

    def call_later(self, callback: Callable[[], None]) -> bool: ...


class ScreenEntry(NamedTuple):
    """A screen: its label in the header, a shorter one for a narrow terminal, and its class as
    `module:class`.
    """

    label: str
    short: str
    source: str

    def load(self) -> Screen[None]:
        return self.kind()()

    def kind(self) -> Callable[[], Screen[None]]:
        """The class."""
        module, _, name = self.source.partition(":")
        kind: Callable[[], Screen[None]] = getattr(import_module(module), name)
        return kind


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
