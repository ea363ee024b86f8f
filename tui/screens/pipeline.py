"""The pipeline screen."""

from typing import ClassVar

from tui.screens.base import WorkbenchScreen


class PipelineScreen(WorkbenchScreen):
    """To be built."""

    NAME: ClassVar[str] = "pipeline"
