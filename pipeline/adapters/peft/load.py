"""Load adapters in PEFT's format; anything that does not match the base or the model is rejected."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import PREFIX, attach, saves_embedding_or_head, targeted, tensors, untie
from pipeline.adapters.config import CONFIG, LORA, OTHER_KINDS, VIRTUAL, WEIGHTS, AdapterSpec
from pipeline.adapters.folder import Fingerprint, read_config, refuse_foreign
from pipeline.adapters.lora import fan_in_fan_out, weight_of
from pipeline.adapters.peft.config import read_spec
from pipeline.adapters.peft.tensors import COPY, read_tensors
from pipeline.adapters.peft.virtual_tokens import load_virtual
from pipeline.errors import UserError
from pipeline.files.base_model import base_fingerprint
from pipeline.files.patterns import one_budget
from pipeline.files.safetensors_file import refuse_difference
from pipeline.models.base import CausalLM

_A_KEYS = (".lora_A.weight", ".lora_embedding_A")


@one_budget()
def load_lora(model: CausalLM, base_folder: Path, folder: Path) -> AdapterSpec:
    """Attach LoRA or DoRA, with the modules and rows that are trained beside it."""
    spec = read_spec(folder, model.embedding_and_head[0])
    spec = replace(spec, rows=_normalized_rows(model, spec, folder / CONFIG, base_folder))
    names = targeted(model, spec)
    if max((row for ids in spec.rows.values() for row in ids), default=0) >= model.shape.rows:
        raise UserError(
            f"{folder}: the adapter trains row {max(row for ids in spec.rows.values() for row in ids)}, but "
            f"{base_folder} has {model.shape.rows} rows. Pass the base it was trained on with --base."
        )
    only_one = saves_embedding_or_head(model, spec) or model.embedding_name in names
    if model.shape.tied and only_one and read_config(folder).get("ensure_weight_tying"):
        raise UserError(
            f"{folder / CONFIG}: ensure_weight_tying with only one of {' and '.join(model.embedding_and_head)} is not "
            "supported. Train without it, or on both."
        )
    values = read_tensors(folder)
    base_parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in [key for key in values if key.endswith(COPY)]:  # PEFT saves the base's embedding with LoRA on it
        name, value = f"{key.removeprefix(PREFIX).removesuffix(COPY)}.weight", values.pop(key)
        weight = base_parameters.get(name)
        if weight is None or (value.shape == weight.shape and weight.is_meta):
            continue
        if value.shape != weight.shape or not torch.equal(weight, value.to(weight)):
            raise other_embedding(folder, name)
    _refuse_large_ranks(model, spec, names, values, folder / WEIGHTS)
    # PEFT saves a tied pair twice: it was untied if embedding and head were trained in full to different weights
    pair = [values.get(f"{PREFIX}{name}.weight") for name in (model.embedding_name, model.head_name)]
    if model.shape.tied and all(w is not None for w in pair) and not torch.equal(*pair):  # type: ignore[arg-type]
        untie(model)
    attach(model, spec, next((value.dtype for key, value in values.items() if key.endswith(_A_KEYS)), None))
    parameters = tensors(model, spec)
    expected = {key: tuple(p.shape) for key, p in parameters.items()}
    refuse_difference(expected, {key: tuple(t.shape) for key, t in values.items()}, str(folder / WEIGHTS))
    new = {}
    for key, p in parameters.items():  # a copy, in the dtype of the layer: the tensor read may be a mapped file
        value = values[key].to("cpu" if p.is_meta else p.device, p.dtype, copy=True)
        new[id(p)] = nn.Parameter(value, requires_grad=False)
    for module in model.modules():  # replaced, not written to, everywhere they are tied
        for name, p in module._parameters.items():  # type: ignore[assignment]
            module._parameters[name] = new.get(id(p), p)
    model.requires_grad_(False)
    return spec


def load_adapter(model: CausalLM, base_folder: Path, folder: Path, fingerprint: Fingerprint = base_fingerprint) -> Any:
    """Attach the adapter in `folder` to `model`, which was loaded from `base_folder`, or is its skeleton.

    Returns what its kind's loader does: the AdapterSpec of LoRA, the VirtualSpec of virtual tokens.
    The model's parameters are replaced, never written to, so that a model sharing its tensors is unchanged.
    Raises UserError if the adapter was edited, was trained on another base, has other tensors than its config and this
    model require, or tensors that are not finite; `model` must not be used after that.
    """
    refuse_foreign(base_folder, folder, fingerprint)
    kind = str(read_config(folder).get("peft_type") or LORA)
    if kind in OTHER_KINDS:
        return import_module(OTHER_KINDS[kind]).load(model, base_folder, folder)
    return (load_virtual if kind in VIRTUAL else load_lora)(model, base_folder, folder)  # read_spec rejects the rest


def other_embedding(folder: Path, name: str) -> UserError:
    """The error for an adapter whose copy of the base's embedding differs from the base's."""
    return UserError(
        f"{folder / WEIGHTS} contains its own {name}, which differs from the base model's: it was resized or trained. "
        "Pass the base it was trained on, or save it under modules_to_save."
    )


def _normalized_rows(model: CausalLM, spec: AdapterSpec, path: Path, base_folder: Path) -> dict[str, tuple[int, ...]]:
    """The spec's rows by the last part of embedding's and head's names; of a tied pair the embedding's only.

    Raises UserError for rows of another module, and for rows that differ in a tied pair: PEFT trains them separately
    but merges both into the same matrix.
    """
    last_parts = dict(zip((model.embedding_name, model.head_name), model.embedding_and_head, strict=True))
    rows: dict[str, tuple[int, ...]] = {}
    for name, ids in spec.rows.items():
        last_part = next((last for full, last in last_parts.items() if full.endswith(name)), None)
        if last_part is None:
            allowed = " and ".join(model.embedding_and_head)
            raise UserError(f"{path}: trainable_token_indices may name {allowed} only, got {', '.join(spec.rows)}.")
        rows[last_part] = ids
    embedding, head = model.embedding_and_head
    if model.shape.tied and head in rows and rows.pop(head) != rows.get(embedding):
        raise UserError(
            f"{path}: trainable_token_indices must name {embedding}, or {embedding} and {head} with the same rows: "
            f"they are tied in {base_folder}. Train the adapter that way, or on a base with an untied head."
        )
    return rows


def _refuse_large_ranks(
    model: CausalLM, spec: AdapterSpec, names: list[str], values: Mapping[str, Tensor], path: Path
) -> None:
    """Raises UserError for a rank above that of every tensor in the file, before memory is allocated for it."""
    shapes = {key: tuple(value.shape) for key, value in values.items() if key.endswith(_A_KEYS)}
    largest = max((shape[0] for shape in shapes.values() if shape), default=0)
    for name in names:
        if (rank := spec.rank_of(name)) > largest:
            layer = model.get_submodule(name)
            key = f"{PREFIX}{name}{_A_KEYS[isinstance(layer, nn.Embedding)]}"
            inputs = weight_of(layer).shape[0 if fan_in_fan_out(layer) else 1]
            refuse_difference({key: (rank, inputs)}, {key: shapes[key]} if key in shapes else {}, str(path))
