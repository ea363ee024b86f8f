"""Resume checkpoints: a folder of safetensors and JSON, written atomically and bound to a cache key."""

import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.save import load_tensors, save_tensors
from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import checkpoints, discard_checkpoints

STATE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state of optimizer, learners and evaluation after `step` steps.

    `logs`: file in the run folder → number of steps logged so far. A checkpoint is unusable without them.
    """

    step: int
    state: dict[str, Tensor]
    logs: Mapping[str, int]


def save(run: Path, key: str, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, then delete the older ones, so that a complete one exists at any moment."""
    target = run / f"checkpoint-{checkpoint.step:09d}"
    with artifact.writing(target) as folder:
        save_tensors(folder / STATE, checkpoint.state)
        artifact.seal(folder, {"key": key, "step": checkpoint.step, "logs": dict(checkpoint.logs)})
    discard_checkpoints(run, keep=target)


def load(run: Path, key: str) -> tuple[Checkpoint | None, str | None]:
    """The newest usable checkpoint and None, or None and the reason why the existing ones are unusable, if any."""
    reason = None
    for folder in checkpoints(run):
        try:
            meta = artifact.verify(folder)
            if meta["key"] != key:
                reason = "it was made with other params, data or code"
                continue
            incomplete = [name for name, lines in meta["logs"].items() if len(read_steps(run / name)) < lines]
            if incomplete:
                reason = f"{run / incomplete[0]} does not reach step {meta['logs'][incomplete[0]]}"
                continue
            return Checkpoint(meta["step"], load_tensors(folder / STATE), meta["logs"]), None
        except (UserError, KeyError) as error:
            reason = str(error)
    return None, reason


class HeldSignals:
    """Defers Ctrl-C and SIGTERM to the end of a step, so that a checkpoint never holds half a step.

    Inside the context, the first SIGINT or SIGTERM only sets `received`; the second is handled as usual.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "HeldSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._hold)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hold(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])
