"""An adapter in the format of mlx-lm."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.adapters.config import CONFIG, read_config
from pipeline.certify.groups import Stored, stored_in
from pipeline.certify.kinds import Checked, Found, Kind
from pipeline.errors import UserError

WEIGHTS = "adapters.safetensors"


def _recognizes(path: Path) -> bool:
    return (path / CONFIG).is_file() and "fine_tune_type" in read_config(path)


def _tensors(checked: Checked) -> Mapping[str, Stored]:
    return stored_in(checked.folder / WEIGHTS)


def _inspect(checked: Checked) -> Found:
    if not (checked.folder / WEIGHTS).is_file():
        raise UserError(f"{checked.folder} has no {WEIGHTS}. Save the adapter with mlx-lm again.")
    return Found([], [])  # the runner compares all keys


KIND = Kind(
    2,
    f"an adapter of mlx-lm ({WEIGHTS})",
    "mlx",
    _recognizes,
    files=lambda folder: [folder / CONFIG, folder / WEIGHTS],
    tensors=_tensors,
    inspect=_inspect,
    rounding=lambda _: None,
    is_adapter=lambda _: True,
)
