"""Read the tensors of an adapter's file."""

from pathlib import Path

from torch import Tensor

from pipeline.adapters.config import WEIGHTS
from pipeline.adapters.folder import refuse_pickle
from pipeline.errors import UserError
from pipeline.models.save import load_tensors

COPY = ".base_layer.weight"  # the base's own weight, which PEFT saves with an embedding's LoRA


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors. Raises UserError if they cannot be read or are not finite."""
    refuse_pickle(folder)
    tensors = load_tensors(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():  # 8 bits have no isfinite
            raise UserError(
                f"{folder / WEIGHTS}: {key} is not finite. Train the adapter again with a lower learning_rate."
            )
    return tensors
