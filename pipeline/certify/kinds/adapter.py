"""An adapter in PEFT's format."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.adapters.config import CONFIG, LORA, WEIGHTS, Unsupported, read_config
from pipeline.certify.groups import Stored, stored_in
from pipeline.certify.kinds import Checked, Found, Kind
from pipeline.errors import UserError
from pipeline.files.base_model import tensor_locations
from pipeline.models.load import skeleton
from pipeline.weights.merge_plan import attach_to_meta_model


def _recognizes(path: Path) -> bool:
    return (path / CONFIG).is_file() and "fine_tune_type" not in read_config(path)


def _tensors(checked: Checked) -> Mapping[str, Stored]:
    return stored_in(checked.folder / WEIGHTS)


def _inspect(checked: Checked) -> Found:
    """Why our own reader rejects it: keys, shapes, settings, another base."""
    base, folder = checked.base, checked.folder
    if not (folder / WEIGHTS).is_file():  # a program would open a pickle instead
        raise UserError(
            f"{folder} has no {WEIGHTS}. Save the adapter with PEFT's save_pretrained, "
            "which writes safetensors."
        )
    found = Found([], [])
    config = read_config(folder)
    if config.get("peft_type") == LORA and "lora_alpha" not in config:
        found.problems.append(f"{CONFIG} has no lora_alpha: PEFT takes 8")
    locations = tensor_locations(base)
    try:
        model = skeleton(base, checked.trust_remote_code)
        attach_to_meta_model(model, base, locations, folder)
    except Unsupported as error:
        found.notes.append(str(error))
    except UserError as error:
        found.problems.append(str(error))
    return found


KIND = Kind(
    1,
    f"an adapter of PEFT ({CONFIG})",
    "peft",
    _recognizes,
    files=lambda folder: [folder / CONFIG, folder / WEIGHTS],
    tensors=_tensors,
    inspect=_inspect,
    rounding=lambda _: None,
    is_adapter=lambda _: True,
)
