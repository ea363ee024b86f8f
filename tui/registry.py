"""The screens, in the order of their keys. A screen is imported when it is first shown."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from textual.screen import Screen


class ScreenEntry(NamedTuple):
    """A screen: its label in the tab bar, and its class as `module:class`."""

    label: str
    source: str

    def load(self) -> Screen[None]:
        module, _, name = self.source.partition(":")
        make: Callable[[], Screen[None]] = getattr(import_module(module), name)
        return make()


SCREENS = {
    "pipeline": ScreenEntry("Pipeline", "tui.screens.pipeline.screen:PipelineScreen"),
    "curves": ScreenEntry("Curves", "tui.screens.curves.screen:CurvesScreen"),
    "calculator": ScreenEntry("Calculator", "tui.screens.calculator.screen:CalculatorScreen"),
    "adapters": ScreenEntry("Adapters", "tui.screens.adapters.screen:AdaptersScreen"),
}
