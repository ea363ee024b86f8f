"""An adapter as one low-rank update per module, the form that servers accept and that adapters are combined in."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import PREFIX, short_targets
from pipeline.adapters.config import CONFIG, WEIGHTS, AdapterSpec
from pipeline.adapters.lora import LoRAEmbedding, LoRALinear, fan_in_fan_out
from pipeline.adapters.low_rank import LowRank, tensors_of
from pipeline.adapters.peft.config import config_of
from pipeline.errors import UserError
from pipeline.files.artifact import write_json
from pipeline.files.shards import TensorLocation, tensor_locations
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.models.save import save_tensors
from pipeline.weights.edits import AddLowRank, RescaleRows, SetRows
from pipeline.weights.merge_plan import attach_to_meta_model, find_location, merge_edits
from pipeline.weights.streaming import read_rows

Updates = dict[str, LowRank]  # by full module name


def low_rank_updates(base: Path, adapter: Path, trust_remote_code: bool = False) -> Updates:
    """All changes of the adapter as low-rank updates, in the order of the model's modules.

    n trained token rows are exactly an update of rank n: one factor selects the rows, the other holds their difference
    from the base. Raises UserError for changes that are not low-rank, and for an adapter that does not fit the base.
    """
    model, stored = skeleton(base, trust_remote_code), tensor_locations(base)
    spec = attach_to_meta_model(model, base, stored, adapter)
    updates: Updates = {}
    for parameter, edit in merge_edits(model, spec).items():
        name = parameter.removesuffix(".weight")
        if isinstance(edit, AddLowRank):
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear | LoRAEmbedding)
            b, a = (edit.right.T, edit.left.T) if fan_in_fan_out(layer.base) else (edit.left, edit.right)
            updates[name] = LowRank(a, b, edit.scale, isinstance(layer, LoRAEmbedding))
        elif isinstance(edit, SetRows):
            location = find_location(parameter, model, stored)
            if location is None:
                raise UserError(
                    f"{base} has no tensor {parameter}. Save the model again with transformers' save_pretrained."
                )
            updates[name] = _row_update(edit, location, embedding=name == model.embedding_name)
        elif isinstance(edit, RescaleRows):
            raise UserError(
                f"{adapter}: {name} was trained with DoRA, which rescales whole rows: the update is not low-rank. "
                "Merge the adapter instead: lora merge --adapter, or lora export --format merged."
            )
        else:
            raise UserError(
                f"{adapter}: {name} was trained in full (modules_to_save): the update is not low-rank. Merge the "
                "adapter instead, or train again with finetune_lora.train_embeddings set to new_rows or none."
            )
    return {name: updates[name] for name, _ in model.named_modules() if name in updates}


def _row_update(edit: SetRows, location: TensorLocation, embedding: bool) -> LowRank:
    difference = edit.values.float() - read_rows(location, edit.ids.tolist()).float()  # (n, D)
    selection = torch.zeros(len(edit.ids), location.info.shape[0])
    selection[torch.arange(len(edit.ids)), edit.ids] = 1  # (n, V)
    return LowRank(selection, difference.T, 1.0, embedding=True) if embedding else LowRank(difference, selection.T, 1.0)


def write_updates(
    folder: Path, updates: Updates, model: CausalLM, base_name: str, saved: Mapping[str, Tensor] | None = None
) -> AdapterSpec:
    """Write adapter_config.json and adapter_model.safetensors; returns the adapter's settings.

    `saved`: parameters of modules that are saved in full (modules_to_save), by full name.
    """
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in saved or {}})
    spec = replace(_adapter_spec(updates, model), saved=tuple(modules))
    transposed = any(is_conv1d(model.get_submodule(name)) for name in updates)
    pairs = {key: t for name, update in updates.items() for key, t in tensors_of(name, update).items()}
    save_tensors(folder / WEIGHTS, pairs | {PREFIX + name: t for name, t in (saved or {}).items()})
    write_json(folder / CONFIG, config_of(spec, base_name, transposed))
    return spec


def _adapter_spec(updates: Updates, model: CausalLM) -> AdapterSpec:
    """Settings with the most common rank and alpha; other modules get a rank_pattern and alpha_pattern entry each."""
    (rank, scale), _ = Counter((update.rank, update.scale) for update in updates.values()).most_common(1)[0]
    others = {name: update for name, update in updates.items() if (update.rank, update.scale) != (rank, scale)}
    embedding = [model.embedding_name.rsplit(".", 1)[-1]] if model.embedding_name in updates else []
    linears = [name for name in updates if name != model.embedding_name]
    return AdapterSpec(
        rank=rank,
        alpha=scale * rank,
        targets=tuple(sorted((*(short_targets(model, linears) if linears else ()), *embedding))),
        ranks={re.escape(name): update.rank for name, update in others.items()},
        alphas={re.escape(name): update.scale * update.rank for name, update in others.items()},
    )
