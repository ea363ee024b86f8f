"""The inference process (`pipeline/inference/server.py`), which all screens ask. In a demo without
weights it is one that replays recorded answers (`pipeline/inference/replay.py`).
"""

from collections.abc import Sequence
from pathlib import Path

from pipeline.files.artifact import not_shipped
from pipeline.files.async_worker import AsyncWorker
from pipeline.files.base_model import IMPORTED
from pipeline.files.worker import python_module
from pipeline.project.process import environment

COMMAND = python_module("pipeline.inference.server", "pipeline.stages.registry")
ANSWERS = "answers.json"  # of a demo


class Inference(AsyncWorker):
    """One inference process. If it ends, its models are lost: load them again.

    `replays`: whether its answers are recorded ones.
    """

    def __init__(self, cwd: Path, command: Sequence[str] = COMMAND) -> None:
        self.replays = has_recorded_answers(cwd)
        if self.replays:
            command = python_module("pipeline.inference.replay", ANSWERS)
        advice = "Prompt again to start a new one."
        super().__init__(command, cwd, "The inference process", advice, environment)


def has_recorded_answers(project: Path) -> bool:
    """Whether a project is a demo whose base has no weights, but recorded answers."""
    return (project / ANSWERS).is_file() and bool(not_shipped(project / IMPORTED))
