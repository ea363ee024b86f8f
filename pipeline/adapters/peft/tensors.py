"""An adapter's numbers, from its file."""

from pathlib import Path

from torch import Tensor

from pipeline.adapters.folder import WEIGHTS, refuse_pickle
from pipeline.errors import UserError
from pipeline.models.save import load_tensors

COPY = ".base_layer.weight"  # of the base's own weight, as PEFT writes it beside an embedding's LoRA


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors. Raises UserError if they cannot be read or are not finite."""
    refuse_pickle(folder)
    found = load_tensors(folder / WEIGHTS)
    for key, tensor in found.items():
        if not tensor.float().isfinite().all():  # 8 bits have no isfinite
            raise UserError(
                f"{folder / WEIGHTS}: {key} is not finite. Train the adapter again with a lower learning_rate."
            )
    return found
