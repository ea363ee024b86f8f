"""Resume checkpoints: safetensors and JSON in a folder that appears whole, bound to a cache key."""

import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.save import load_tensors, save_tensors
from pipeline.project.logs.run_log import LOSS, read_steps
from pipeline.project.runner import checkpoints, discard_checkpoints

STATE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The optimizer's state after `step` steps, in which `tokens` were learned from.

    `logs`: how many lines each log of the run folder has then, by name; one of `step` lines where it is left out.
    """

    step: int
    tokens: int
    state: dict[str, Tensor]
    logs: Mapping[str, int] = field(default_factory=dict)


def save(run: Path, key: str, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, then drop the older ones: at any moment one that is whole stands."""
    target = run / f"checkpoint-{checkpoint.step:09d}"
    with artifact.writing(target) as folder:
        save_tensors(folder / STATE, checkpoint.state)
        logs = checkpoint.logs or {LOSS: checkpoint.step}
        meta = {"key": key, "step": checkpoint.step, "tokens": checkpoint.tokens, "logs": logs}
        artifact.seal(folder, meta)
    discard_checkpoints(run, keep=target)


def load(run: Path, key: str) -> tuple[Checkpoint | None, str | None]:
    """The newest usable checkpoint, or None and, if there was one, why it is refused."""
    reason = None
    for folder in checkpoints(run):
        try:
            meta = artifact.verify(folder)
            if meta["key"] != key:
                reason = "it was made with other params, data or code"
                continue
            short = [name for name, lines in meta["logs"].items() if len(read_steps(run / name)) < lines]
            if short:
                reason = f"{run / short[0]} does not reach step {meta['logs'][short[0]]}"
                continue
            return Checkpoint(meta["step"], meta["tokens"], load_tensors(folder / STATE), meta["logs"]), None
        except (UserError, KeyError) as error:
            reason = str(error)
    return None, reason


class HeldSignals:
    """Ctrl-C and SIGTERM, held back to a step boundary: a checkpoint is never half a step.

    While entered, the first SIGINT or SIGTERM only sets `received`; the second acts as it always does.
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
