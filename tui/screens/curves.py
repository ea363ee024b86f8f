"""The curves screen."""

from typing import ClassVar

from tui.screens.base import WorkbenchScreen


class CurvesScreen(WorkbenchScreen):
    """To be built."""

    NAME: ClassVar[str] = "curves"
