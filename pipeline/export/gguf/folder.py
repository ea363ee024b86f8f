"""A folder of GGUF files: the tokenizer and the metadata to write, and what it may replace."""

from pathlib import Path
from typing import Any

from pipeline.adapters.folder import origin_of
from pipeline.data.tokenizers.chat_template import TEMPLATE
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.errors import UserError
from pipeline.export.model_card import has_card
from pipeline.files import artifact
from pipeline.weights.merge import CERTIFICATE


def is_earlier_export(out: Path) -> bool:
    """Whether `out` is a folder that an export with a certificate wrote."""
    return has_card(out) and (out / CERTIFICATE).exists() and not (out / artifact.MANIFEST).exists()


def tokenizer_of(base: Path, adapter: Path) -> SubwordTokenizer:
    """The base's tokenizer, with the chat template of the adapter's training. Raises UserError."""
    tokenizer = SubwordTokenizer.load(base)
    path = adapter / TEMPLATE
    if not path.is_file():
        return tokenizer
    try:
        return tokenizer.with_template(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8. Copy the adapter again.") from None


def general(adapter: Path, base: Path, base_name: str | None) -> dict[str, Any]:
    """Metadata of a file's origin. `base_name` defaults to the hub id of the base."""
    origin = origin_of(adapter, base)
    base_name = base_name or (origin.hub_id if origin else None)
    facts: dict[str, Any] = {"general.type": "model", "general.name": adapter.resolve().name}
    if base_name:
        organization, _, short = base_name.rpartition("/")
        facts |= {"general.base_model.count": 1, "general.base_model.0.name": short}
        if organization:
            facts["general.base_model.0.organization"] = organization
    if origin and (license := origin.license.get("license")):
        facts["general.license"] = license
    return facts
