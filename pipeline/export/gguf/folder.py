"""What a folder of GGUF files has beside tensors: the tokenizer to write, where it comes from, what it replaces."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.adapters.folder import origin_of
from pipeline.data.tokenizers.subword import GENERATION
from pipeline.errors import UserError
from pipeline.export.model_card import has_card
from pipeline.files import artifact
from pipeline.weights.import_adapter import copy_template, copy_tokenizer
from pipeline.weights.merge import CERTIFICATE

_LICENSE = re.compile(r"^license: ([\w.-]+)$", re.MULTILINE)


def require_gguf() -> None:
    """Raises UserError without the gguf package."""
    if find_spec("gguf") is None:
        raise UserError("GGUF export needs the gguf package: pip install 'lora-workbench[gguf]'.")


def is_earlier_export(out: Path) -> bool:
    """Whether `out` is a folder that an export with a certificate wrote."""
    return has_card(out) and (out / CERTIFICATE).exists() and not (out / artifact.MANIFEST).exists()


@contextmanager
def tokenizer_folder(base: Path, adapter: Path) -> Iterator[Path]:
    """The tokenizer files of the merged model: the base's, with the adapter's chat template."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_tokenizer(base, folder)
        if (base / GENERATION).is_file():  # names end tokens
            shutil.copyfile(base / GENERATION, folder / GENERATION)
        copy_template(adapter, folder)
        yield folder


def general(name: str, adapter: Path, base: Path, base_name: str | None) -> dict[str, Any]:
    """Metadata that say where a file comes from; `base_name`: default the hub id of the base."""
    origin = origin_of(adapter, base)
    base_name = base_name or (origin.hub_id if origin else None)
    facts: dict[str, Any] = {"general.type": "model", "general.name": name}
    if base_name:
        facts |= {"general.base_model.count": 1, "general.base_model.0.name": base_name.rpartition("/")[2]}
        if origin and origin.hub_id == base_name:
            facts["general.base_model.0.repo_url"] = f"https://huggingface.co/{base_name}"
    readme = base / "README.md"
    if readme.is_file() and (match := _LICENSE.search(readme.read_text(encoding="utf-8", errors="replace"))):
        facts["general.license"] = match[1]
    return facts
