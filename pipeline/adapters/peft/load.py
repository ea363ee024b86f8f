"""Load adapters in PEFT's format; anything that does not match the base or the model is rejected."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import PREFIX, attach, saves_embedding_or_head, targeted, tensors, untie
from pipeline.adapters.config import CONFIG, VIRTUAL, WEIGHTS, AdapterSpec
from pipeline.adapters.folder import Fingerprint, read_config, refuse_foreign
from pipeline.adapters.lora import fan_in_fan_out, weight_of
from pipeline.adapters.peft.config import read_spec
from pipeline.adapters.peft.tensors import COPY, read_tensors
from pipeline.adapters.peft.virtual_tokens import VirtualSpec, load_virtual
from pipeline.errors import UserError
from pipeline.files.base_model import base_fingerprint
from pipeline.files.patterns import one_budget
from pipeline.files.safetensors_header import refuse_difference
from pipeline.models.base import CausalLM

_A_KEYS = (".lora_A.weight", ".lora_embedding_A")


@one_budget()
def load_adapter(
    model: CausalLM, base_folder: Path, folder: Path, fingerprint: Fingerprint = base_fingerprint
) -> AdapterSpec | VirtualSpec:
    """Attach the adapter in `folder` to `model`, which was loaded from `base_folder`, or is its skeleton.

    The model's parameters are replaced, never written to, so that a model sharing its tensors is unchanged.
    Raises UserError if the adapter was edited, was trained on another base, has other tensors than its config and this
    model require, or tensors that are not finite; `model` must not be used after that.
    """
    refuse_foreign(base_folder, folder, fingerprint)
    if str(read_config(folder).get("peft_type")) in VIRTUAL:
        return load_virtual(model, folder)
    return _load_weight_changes(model, base_folder, folder)


def _load_weight_changes(model: CausalLM, base_folder: Path, folder: Path) -> AdapterSpec:
    """Every adapter except virtual tokens."""
    spec = _normalize_rows(model, read_spec(folder, model.embedding_and_head[0]), folder / CONFIG, base_folder)
    names = targeted(model, spec)
    _refuse_unfit(model, spec, names, folder, base_folder)
    values = _without_embedding_copies(read_tensors(folder), model, folder)
    _refuse_large_ranks(model, spec, names, values, folder / WEIGHTS)
    if model.shape.tied and _unties(model, values):
        untie(model)
    attach(model, spec, next((value.dtype for key, value in values.items() if key.endswith(_A_KEYS)), None))
    parameters = tensors(model, spec)
    expected = {key: tuple(p.shape) for key, p in parameters.items()}
    refuse_difference(expected, {key: tuple(t.shape) for key, t in values.items()}, str(folder / WEIGHTS))
    _replace_parameters(model, {id(p): _as_parameter(values[key], p) for key, p in parameters.items()})
    model.requires_grad_(False)
    return spec


def _as_parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """`value` with the dtype and device of `like`, or on the CPU if that is on the meta device. A copy: the tensor read
    may be a mapped file."""
    device = "cpu" if like.is_meta else like.device
    return nn.Parameter(value.to(device, like.dtype, copy=True), requires_grad=False)


def _replace_parameters(model: nn.Module, values: Mapping[int, nn.Parameter]) -> None:
    """Replace the parameters whose ids are keys of `values`, everywhere they are tied."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in values:
                module._parameters[name] = values[id(parameter)]


def _without_embedding_copies(values: Mapping[str, Tensor], model: CausalLM, folder: Path) -> dict[str, Tensor]:
    """Drop the base's embedding, which PEFT saves with LoRA on it. Raises UserError if it is not this base's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in (key for key in values if key.endswith(COPY)):
        name = f"{key.removeprefix(PREFIX).removesuffix(COPY)}.weight"
        if name in parameters and not _is_copy(values[key], parameters[name]):
            raise other_embedding(folder, name)
    return {key: value for key, value in values.items() if not key.endswith(COPY)}


def other_embedding(folder: Path, name: str) -> UserError:
    """The error for an adapter whose copy of the base's embedding differs from the base's."""
    return UserError(
        f"{folder / WEIGHTS} contains its own {name}, which differs from the base model's: it was resized or trained. "
        "Pass the base it was trained on, or save it under modules_to_save."
    )


def _is_copy(value: Tensor, weight: Tensor) -> bool:
    same_shape = value.shape == weight.shape
    return same_shape and (weight.is_meta or torch.equal(weight, value.to(weight)))


def _unties(model: CausalLM, values: Mapping[str, Tensor]) -> bool:
    """Whether embedding and head were trained in full to different weights: PEFT saves a tied pair twice."""
    pair = [values.get(f"{PREFIX}{name}.weight") for name in (model.embedding_name, model.head_name)]
    return all(weight is not None for weight in pair) and not torch.equal(*pair)  # type: ignore[arg-type]


def _normalize_rows(model: CausalLM, spec: AdapterSpec, path: Path, base_folder: Path) -> AdapterSpec:
    """`spec` with its rows under the last part of embedding's and head's names; of a tied pair the embedding's only.

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
    return replace(spec, rows=rows)


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


def _refuse_unfit(model: CausalLM, spec: AdapterSpec, names: list[str], folder: Path, base_folder: Path) -> None:
    """Raises UserError for rows beyond the embedding's, and for ensure_weight_tying where it would tie a pair."""
    rows = [row for ids in spec.rows.values() for row in ids]
    if rows and max(rows) >= model.shape.rows:
        raise UserError(
            f"{folder}: the adapter trains row {max(rows)}, but {base_folder} has {model.shape.rows} rows. Pass the "
            "base it was trained on with --base."
        )
    only_one = saves_embedding_or_head(model, spec) or model.embedding_name in names
    if model.shape.tied and only_one and read_config(folder).get("ensure_weight_tying"):
        raise UserError(
            f"{folder / CONFIG}: ensure_weight_tying with only one of {' and '.join(model.embedding_and_head)} is not "
            "supported. Train without it, or on both."
        )
