"""A whole checkpoint: the adapter merged into its base, with model card and certificate."""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.export.formats import Export, Format
from pipeline.files import artifact
from pipeline.project.runner import Event

if TYPE_CHECKING:
    from pipeline.weights.merge import Merging, Verify

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def merging_of(export: Export) -> tuple["Merging", "Verify | None"]:
    """The merge, and the check of its logits if there are prompts. Raises UserError."""
    from pipeline.data.answers.prompts import prompt_texts
    from pipeline.inference.score import SameLogits
    from pipeline.weights.merge import Merging

    base = export.find_base()
    merging = Merging(base, export.adapter, export.precision, export.trust_remote_code)
    if export.prompts is None:
        return merging, None
    texts = prompt_texts(export.prompts)
    check = SameLogits(base, export.adapter, texts, trust_remote_code=export.trust_remote_code)
    return merging, check


def write(export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Merge tensor by tensor, and say what the certificate proves. Raises UserError."""
    from pipeline.export.model_card import card, write_card
    from pipeline.weights.import_adapter import copy_template
    from pipeline.weights.merge import merge_to
    from pipeline.weights.merge_check import describe

    merging, verify = merging_of(export)

    def finish(folder: Path, certificate: dict[str, Any]) -> None:
        copy_template(merging.adapter, folder)
        generation = folder / "generation_config.json"
        if not generation.exists():  # vLLM stops at its end token
            config = artifact.read_json(folder / "config.json", "Copy the base again")
            ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
            artifact.write_json(generation, ids)
        text = card(merging.adapter, certificate, merging.base, export.base_name, out.name)
        write_card(folder, text)

    certificate = yield from merge_to(out, merging, verify, finish)
    return ["  ".join((str(out), *describe(certificate)))]


FORMAT = Format(
    2,
    "a whole checkpoint, merged with the base",
    ("base", "base_name", "precision", "prompts", "trust_remote_code"),
    write,
)
