"""The inference process (`pipeline/inference/server.py`), which all screens ask."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.files.async_worker import AsyncWorker
from pipeline.files.worker import python_module
from pipeline.project.process import environment

COMMAND = python_module("pipeline.inference.server", "pipeline.stages.registry")


class Inference(AsyncWorker):
    """One inference process. If it ends, its models are lost: load them again."""

    def __init__(self, cwd: Path, command: Sequence[str] = COMMAND) -> None:
        advice = "Prompt again to start a new one."
        super().__init__(command, cwd, "The inference process", advice, environment)
