"""The adapters screen."""

from typing import ClassVar

from tui.screens.base import WorkbenchScreen


class AdaptersScreen(WorkbenchScreen):
    """To be built."""

    NAME: ClassVar[str] = "adapters"
