"""The adapter as PEFT reads it, with tokenizer and model card, without this project's files."""

import shutil
from collections.abc import Generator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.export.formats import (
    Export,
    Format,
    adapter_folder,
    note_on_base,
    note_on_quantization,
)
from pipeline.project.runner import Event


def write(export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Copy the adapter: nothing is loaded. Raises UserError."""
    from pipeline.adapters.config import CONFIG, WEIGHTS
    from pipeline.adapters.folder import refuse_pickle

    yield from note_on_quantization(export)
    refuse_pickle(export.adapter)
    with adapter_folder(export, out) as folder:
        for name in (CONFIG, WEIGHTS):
            if not (export.adapter / name).is_file():
                raise UserError(f"{export.adapter} is not an adapter folder: it has no {name}.")
            shutil.copyfile(export.adapter / name, folder / name)
    yield from note_on_base(export)
    return [f"{out}  for PEFT"]


FORMAT = Format(0, "the adapter for PEFT, with a model card", ("base_name",), write, "adapter")
