"""An adapter as low-rank updates alone, one a module: what servers take, and what can be combined."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import PREFIX, short_targets
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.folder import CONFIG, WEIGHTS
from pipeline.adapters.lora import LoRAEmbedding, LoRALinear, fan_in_fan_out
from pipeline.adapters.low_rank import LowRank
from pipeline.adapters.peft.config import config_of
from pipeline.adapters.peft.updates import tensors_of
from pipeline.errors import UserError
from pipeline.files.artifact import write_json
from pipeline.files.shards import Place, places
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.models.save import save_tensors
from pipeline.weights.edits import AddLowRank, RescaleRows, SetRows
from pipeline.weights.merge_plan import attach_to_meta_model, edits_of, place_of
from pipeline.weights.streaming import read_rows

Updates = dict[str, LowRank]  # by module's full name


def updates_of(base: Path, adapter: Path, trust_remote_code: bool = False) -> Updates:
    """All that the adapter changes, in the model's order.

    n rows that were trained one by one are, without loss, an update of rank n: one of its factors picks the rows, the
    other is what they differ by from the base's. Raises UserError for what is of no low rank, or does not fit.
    """
    model, stored = skeleton(base, trust_remote_code), places(base)
    spec = attach_to_meta_model(model, base, stored, adapter)
    found: Updates = {}
    for parameter, edit in edits_of(model, spec).items():
        name = parameter.removesuffix(".weight")
        if isinstance(edit, AddLowRank):
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear | LoRAEmbedding)
            b, a = (edit.right.T, edit.left.T) if fan_in_fan_out(layer.base) else (edit.left, edit.right)
            found[name] = LowRank(a, b, edit.scale, isinstance(layer, LoRAEmbedding))
        elif isinstance(edit, SetRows):
            place = place_of(parameter, model, stored)
            if place is None:
                raise UserError(
                    f"{base}: its files have no {parameter}. Save it anew in transformers with save_pretrained."
                )
            found[name] = _picking(edit, place, embedding=name == model.embedding_name)
        elif isinstance(edit, RescaleRows):
            raise UserError(
                f"{adapter}: {name} was trained with DoRA, which changes the length of whole rows: no update of "
                "low rank. Merge the adapter instead: lora merge --adapter, or lora export --as merged."
            )
        else:
            raise UserError(
                f"{adapter}: {name} was trained in full (modules_to_save), which is no update of low rank. Merge the "
                "adapter instead, or set finetune_lora.train_embeddings to new_rows or none and train "
                "it again."
            )
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _picking(edit: SetRows, place: Place, embedding: bool) -> LowRank:
    change = edit.values.float() - read_rows(place, edit.ids.tolist()).float()  # (n, D)
    picks = torch.zeros(len(edit.ids), place.info.shape[0])
    picks[torch.arange(len(edit.ids)), edit.ids] = 1  # (n, V)
    return LowRank(picks, change.T, 1.0, embedding=True) if embedding else LowRank(change, picks.T, 1.0)


def write_updates(
    folder: Path, updates: Updates, model: CausalLM, base_name: str, saved: Mapping[str, Tensor] | None = None
) -> AdapterSpec:
    """adapter_config.json and adapter_model.safetensors for a model of these modules.

    `saved`: parameters of modules that come in full, by their full name.
    """
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in saved or {}})
    spec = replace(spec_of(updates, model), saved=tuple(modules))
    turned = any(is_conv1d(model.get_submodule(name)) for name in updates)
    pairs = {key: t for name, one in updates.items() for key, t in tensors_of(name, one).items()}
    save_tensors(folder / WEIGHTS, pairs | {PREFIX + name: t for name, t in (saved or {}).items()})
    write_json(folder / CONFIG, config_of(spec, base_name, turned))
    return spec


def spec_of(updates: Updates, model: CausalLM) -> AdapterSpec:
    """Rank and alpha that most have; the others by pattern, each by its full name."""
    (rank, scale), _ = Counter((one.rank, one.scale) for one in updates.values()).most_common(1)[0]
    others = {name: one for name, one in updates.items() if (one.rank, one.scale) != (rank, scale)}
    embedding = [model.embedding_name.rsplit(".", 1)[-1]] if model.embedding_name in updates else []
    linears = [name for name in updates if name != model.embedding_name]
    return AdapterSpec(
        rank=rank,
        alpha=scale * rank,
        targets=tuple(sorted((*(short_targets(model, linears) if linears else ()), *embedding))),
        ranks={re.escape(name): one.rank for name, one in others.items()},
        alphas={re.escape(name): one.scale * one.rank for name, one in others.items()},
    )
