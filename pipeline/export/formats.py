"""Adapters in the form that those who serve them take: PEFT's, vLLM's, or merged into a checkpoint."""

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline.adapters.folder import CONFIG, WEIGHTS, origin_of, read_config, refuse_pickle
from pipeline.errors import UserError
from pipeline.export.model_card import CARD, card, has_card
from pipeline.files import artifact
from pipeline.models.load import skeleton
from pipeline.project.runner import Event
from pipeline.weights.as_low_rank import updates_of, write_updates
from pipeline.weights.import_adapter import copy_template, copy_tokenizer
from pipeline.weights.merge import Merging, Verify, merge_to

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank may be
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def for_peft(adapter: Path, out: Path, base_name: str | None = None) -> None:
    """The adapter, its tokenizer and a card: all that PEFT opens, and nothing of this project's.

    The base is called `base_name`, or by the hub's id that it was imported from. Raises UserError.
    """
    _refuse_other(out, adapter)
    refuse_pickle(adapter)
    with artifact.writing(out) as folder:
        for name in (CONFIG, WEIGHTS):
            if not (adapter / name).is_file():
                raise UserError(f"{adapter} is not an adapter folder: it has no {name}.")
            shutil.copyfile(adapter / name, folder / name)
        _name_base(folder, adapter, None, base_name)
        _finish(folder, adapter, None, base_name)


def for_vllm(
    adapter: Path, base: Path, out: Path, trust_remote_code: bool = False, base_name: str | None = None
) -> int:
    """The adapter within vLLM's rules: low-rank updates alone, scaled by alpha/r.

    Trained rows become updates of embedding and head. The base is called as `for_peft` calls it. Returns the
    --max-lora-rank that it takes. Raises UserError.
    """
    _refuse_other(out, adapter)
    updates = updates_of(base, adapter, trust_remote_code)
    name, widest = max(updates, key=lambda name: updates[name].rank), max(one.rank for one in updates.values())
    if widest > RANKS[-1]:
        raise UserError(
            f"{adapter}: {name} needs rank {widest}; vLLM takes {RANKS[-1]} at most. Export it merged: --as merged."
        )
    named = read_config(adapter).get("base_model_name_or_path") or str(base)
    with artifact.writing(out) as folder:
        write_updates(folder, updates, skeleton(base, trust_remote_code), named)
        _name_base(folder, adapter, base, base_name)
        _finish(folder, adapter, base, base_name)
    return next(rank for rank in RANKS if rank >= widest)


def _refuse_other(out: Path, adapter: Path) -> None:
    artifact.refuse_other(out, has_card(out) and (out / CONFIG).exists(), (adapter,))


def merged(
    out: Path, merging: Merging, verify: Verify | None = None, base_name: str | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """A checkpoint on its own, with what generation needs and a card; returns the merge's certificate.

    Raises UserError.
    """

    def finish(folder: Path, certificate: dict[str, Any]) -> None:
        copy_template(merging.adapter, folder)
        _say_ends(folder)
        text = card(merging.adapter, certificate, merging.base, base_name)
        (folder / CARD).write_text(text, encoding="utf-8")

    return (yield from merge_to(out, merging, verify, finish))


def _name_base(folder: Path, adapter: Path, base: Path | None, base_name: str | None) -> None:
    """Call the base in adapter_config.json by a name that means it elsewhere too, where there is one.

    With tokens added since, the hub's model is not the base any more.
    """
    origin = origin_of(adapter, base)
    names: dict[str, str | None] = {}
    if base_name:
        names = {"base_model_name_or_path": base_name, "revision": None}
    elif origin and not origin.added:
        names = {"base_model_name_or_path": origin.hub_id, "revision": origin.revision}
    if names:
        artifact.write_json(folder / CONFIG, {**read_config(folder), **names})


def _finish(folder: Path, adapter: Path, base: Path | None, base_name: str | None) -> None:
    copy_tokenizer(adapter, folder)
    (folder / CARD).write_text(card(adapter, None, base, base_name), encoding="utf-8")


def _say_ends(folder: Path) -> None:
    """generation_config.json, where the base has none: with which tokens a text begins and ends."""
    path = folder / "generation_config.json"
    if not path.exists():
        config = artifact.read_json(folder / "config.json", "Copy the base anew")
        artifact.write_json(path, {key: config[key] for key in ENDS if config.get(key) is not None})
