"""Read and write safetensors files."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.safetensors_header import as_os_error, shapes

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the metadata of PEFT and transformers. Raises OSError on a full disk."""
    # Copied to the CPU: a checkpoint must also be saved when the device's memory is full.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with as_os_error(path):
        save_file(copies, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises UserError if it cannot be read."""
    shapes(path)  # rejects a damaged file with a clearer reason than safetensors gives
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
