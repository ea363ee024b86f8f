"""The calculator screen."""

from typing import ClassVar

from tui.screens.base import WorkbenchScreen


class CalculatorScreen(WorkbenchScreen):
    """To be built."""

    NAME: ClassVar[str] = "calculator"
