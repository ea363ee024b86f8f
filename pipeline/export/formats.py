"""Export an adapter for PEFT, for vLLM, or merged into a checkpoint."""

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline.adapters.config import CONFIG, WEIGHTS, read_config
from pipeline.adapters.folder import origin_of, refuse_pickle
from pipeline.errors import UserError
from pipeline.export.model_card import CARD, card, has_card
from pipeline.files import artifact
from pipeline.models.load import skeleton
from pipeline.project.runner import Event
from pipeline.weights.combine import low_rank_updates, write_updates
from pipeline.weights.import_adapter import copy_template, copy_tokenizer
from pipeline.weights.merge import Merging, Verify, merge_to

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank accepts
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def for_peft(adapter: Path, out: Path, base_name: str | None = None) -> None:
    """Write the adapter, its tokenizer and a model card to `out`: what PEFT reads, without this project's own files.

    The base is named `base_name`, by default the hub id that it was imported from. Raises UserError.
    """
    _refuse_other(out, adapter)
    refuse_pickle(adapter)
    with artifact.writing(out) as folder:
        for name in (CONFIG, WEIGHTS):
            if not (adapter / name).is_file():
                raise UserError(f"{adapter} is not an adapter folder: it has no {name}.")
            shutil.copyfile(adapter / name, folder / name)
        _name_base(folder, adapter, None, base_name)
        _write_tokenizer_and_card(folder, adapter, None, base_name)


def for_vllm(
    adapter: Path, base: Path, out: Path, trust_remote_code: bool = False, base_name: str | None = None
) -> int:
    """Write the adapter as vLLM supports it: only low-rank updates, scaled by alpha/r.

    Trained token rows become low-rank updates of embedding and head. The base is named as in `for_peft`. Returns the
    --max-lora-rank that vLLM needs. Raises UserError.
    """
    _refuse_other(out, adapter)
    updates = low_rank_updates(base, adapter, trust_remote_code)
    name, widest = max(updates, key=lambda name: updates[name].rank), max(update.rank for update in updates.values())
    if widest > RANKS[-1]:
        raise UserError(
            f"{adapter}: {name} needs rank {widest}, but vLLM supports at most {RANKS[-1]}. "
            "Export with --format merged."
        )
    base_in_config = read_config(adapter).get("base_model_name_or_path") or str(base)
    with artifact.writing(out) as folder:
        write_updates(folder, updates, skeleton(base, trust_remote_code), base_in_config)
        _name_base(folder, adapter, base, base_name)
        _write_tokenizer_and_card(folder, adapter, base, base_name)
    return next(rank for rank in RANKS if rank >= widest)


def _refuse_other(out: Path, adapter: Path) -> None:
    artifact.refuse_other(out, has_card(out) and (out / CONFIG).exists(), (adapter,))


def merged(
    out: Path, merging: Merging, verify: Verify | None = None, base_name: str | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """Write the merged checkpoint with a generation config and a model card; returns the merge's certificate.

    Raises UserError.
    """

    def finish(folder: Path, certificate: dict[str, Any]) -> None:
        copy_template(merging.adapter, folder)
        generation = folder / "generation_config.json"
        if not generation.exists():  # vLLM stops at its end token
            config = artifact.read_json(folder / "config.json", "Copy the base again")
            artifact.write_json(generation, {key: config[key] for key in TOKEN_IDS if config.get(key) is not None})
        text = card(merging.adapter, certificate, merging.base, base_name)
        (folder / CARD).write_text(text, encoding="utf-8")

    return (yield from merge_to(out, merging, verify, finish))


def _name_base(folder: Path, adapter: Path, base: Path | None, base_name: str | None) -> None:
    """Name the base in adapter_config.json by `base_name` or its hub id, which work on other machines too.

    The hub id is not used if tokens were added: the hub's model is then not the base.
    """
    origin = origin_of(adapter, base)
    names: dict[str, str | None] = {}
    if base_name:
        names = {"base_model_name_or_path": base_name, "revision": None}
    elif origin and not origin.added:
        names = {"base_model_name_or_path": origin.hub_id, "revision": origin.revision}
    if names:
        artifact.write_json(folder / CONFIG, {**read_config(folder), **names})


def _write_tokenizer_and_card(folder: Path, adapter: Path, base: Path | None, base_name: str | None) -> None:
    copy_tokenizer(adapter, folder)
    (folder / CARD).write_text(card(adapter, None, base, base_name), encoding="utf-8")
