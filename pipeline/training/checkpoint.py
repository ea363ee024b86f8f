"""Resume checkpoints: safetensors and JSON in a folder that appears whole, bound to a cache key."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline import artifact
from pipeline.errors import UserError
from pipeline.metrics import LOSS, read_steps
from pipeline.models.files import load_tensors, save_tensors
from pipeline.runner import checkpoints, discard_checkpoints

STATE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The optimizer's state after `step` steps, in which `tokens` were learned from."""

    step: int
    tokens: int
    state: dict[str, Tensor]


def save(run: Path, key: str, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, then drop the older ones: at any moment one that is whole stands."""
    target = run / f"checkpoint-{checkpoint.step:09d}"
    with artifact.writing(target) as folder:
        save_tensors(folder / STATE, checkpoint.state)
        meta = {"key": key, "step": checkpoint.step, "tokens": checkpoint.tokens}
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
            if len(read_steps(run / LOSS)) < meta["step"]:
                reason = f"{run / LOSS} does not reach step {meta['step']}"
                continue
            return Checkpoint(meta["step"], meta["tokens"], load_tensors(folder / STATE)), None
        except (UserError, KeyError) as error:
            reason = str(error)
    return None, reason
