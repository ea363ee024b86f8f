"""A checkpoint's files."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.safetensors_header import as_os_error, shapes

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors with PEFT's and transformers' one metadata entry. Raises OSError on a full disk."""
    # Copied on the CPU: a checkpoint is also saved when the device has no byte left.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with as_os_error(path):
        save_file(copies, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises UserError if it cannot be read."""
    shapes(path)  # a damaged file is refused with a reason that the library does not give
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
