"""Adapters on disk in PEFT's format: written so that PEFT opens them, read so that nothing wrong gets in."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import PREFIX, adapter_layers, attach, saves_one_end, separate, tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.folder import CONFIG, VIRTUAL, WEIGHTS, Fingerprint, read_config, refuse_foreign
from pipeline.adapters.lora import LoRALinear, fan_in_fan_out, weight_of
from pipeline.adapters.peft.config import config_of, read_spec
from pipeline.adapters.peft.tensors import COPY, read_tensors
from pipeline.adapters.peft.virtual_tokens import VirtualSpec, load_virtual
from pipeline.adapters.target_modules import targeted
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.files.patterns import one_budget
from pipeline.files.safetensors_header import refuse_difference
from pipeline.models.base import CausalLM
from pipeline.models.linears import is_conv1d
from pipeline.models.save import save_tensors

_FIRST = (".lora_A.weight", ".lora_embedding_A")  # what every adapter has one of


def save_adapter(folder: Path, model: CausalLM, spec: AdapterSpec, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    layers = dict(adapter_layers(model))
    pairs = {
        f"{name}.lora_{which}.weight": one
        for name, layer in layers.items()
        if isinstance(layer, LoRALinear)
        for which, one in zip("AB", layer.pair(), strict=True)
    }
    save_tensors(folder / WEIGHTS, {**tensors(model, spec), **{PREFIX + key: one for key, one in pairs.items()}})
    conv1d = any(is_conv1d(layer.base) for layer in layers.values())
    artifact.write_json(folder / CONFIG, config_of(stored(model, spec), base_name, conv1d))


def stored(model: CausalLM, spec: AdapterSpec) -> AdapterSpec:
    """What the files say of the adapter that `spec` trains: BA − B₀A₀, PiSSA's update of the base, has rank 2R."""
    moved = any(isinstance(layer, LoRALinear) and layer.moved for _, layer in adapter_layers(model))
    return spec.doubled() if moved else spec


@one_budget()
def load_adapter(
    model: CausalLM, base_folder: Path, folder: Path, fingerprint: Fingerprint = base_fingerprint
) -> AdapterSpec | VirtualSpec:
    """Attach the adapter in `folder` to `model`, which was loaded from `base_folder`, or is its skeleton.

    Parameters are replaced by the adapter's; none is written to, so a model that shares its tensors keeps them.
    Raises UserError if the adapter was changed since it was made, was made on another base, or has other tensors
    than its config and this model call for, or such that are not finite; `model` is then of no more use.
    """
    refuse_foreign(base_folder, folder, fingerprint)
    if str(read_config(folder).get("peft_type")) in VIRTUAL:
        return load_virtual(model, folder)
    return _load_changes(model, base_folder, folder)


def _load_changes(model: CausalLM, base_folder: Path, folder: Path) -> AdapterSpec:
    """What changes weights: all but virtual tokens."""
    spec = _rows_by_ends(model, read_spec(folder, model.embedding_and_head[0]), folder / CONFIG, base_folder)
    names = targeted(model, spec)
    _refuse_unfit(model, spec, names, folder, base_folder)
    values = _without_copies(read_tensors(folder), model, folder)
    _refuse_wide(model, spec, names, values, folder / WEIGHTS)
    if model.shape.tied and _differ(model, values):
        separate(model)
    attach(model, spec, next((value.dtype for key, value in values.items() if key.endswith(_FIRST)), None))
    places = tensors(model, spec)
    expected, found = ({key: tuple(t.shape) for key, t in some.items()} for some in (places, values))
    refuse_difference(expected, found, str(folder / WEIGHTS))
    _fill(model, {id(parameter): _like(values[key], parameter) for key, parameter in places.items()})
    model.requires_grad_(False)
    return spec


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    """In the parameter's precision and on its device, or here where it has none: a copy, what was read may be a mapped
    file."""
    device = "cpu" if parameter.is_meta else parameter.device
    return nn.Parameter(value.to(device, parameter.dtype, copy=True), requires_grad=False)


def _fill(model: nn.Module, values: Mapping[int, nn.Parameter]) -> None:
    """Put parameters in the places of others, which are given by their id: in all of them, where they are tied."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in values:
                module._parameters[name] = values[id(parameter)]


def _without_copies(values: Mapping[str, Tensor], model: CausalLM, folder: Path) -> dict[str, Tensor]:
    """PEFT writes the base's whole embedding beside its LoRA, which may be another than that of this base."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for key in (key for key in values if key.endswith(COPY)):
        name = f"{key.removeprefix(PREFIX).removesuffix(COPY)}.weight"
        if name in own and not _is_copy(values[key], own[name]):
            raise other_embedding(folder, name)
    return {key: value for key, value in values.items() if not key.endswith(COPY)}


def other_embedding(folder: Path, name: str) -> UserError:
    return UserError(
        f"{folder / WEIGHTS} comes with another {name} than its base has: its embedding was resized or trained "
        "besides. Give the base with that embedding, or train it as modules_to_save."
    )


def _is_copy(value: Tensor, weight: Tensor) -> bool:
    same_shape = value.shape == weight.shape
    return same_shape and (weight.is_meta or torch.equal(weight, value.to(weight)))


def _differ(model: CausalLM, values: Mapping[str, Tensor]) -> bool:
    """Whether embedding and head were trained in full and apart: PEFT has two of a tied pair."""
    pair = [values.get(f"{PREFIX}{name}.weight") for name in (model.embedding_name, model.head_name)]
    return all(one is not None for one in pair) and not torch.equal(*pair)  # type: ignore[arg-type]


def _rows_by_ends(model: CausalLM, spec: AdapterSpec, place: Path, base_folder: Path) -> AdapterSpec:
    """`spec` with its rows by the last names of embedding and head; by the embedding's alone, if the two are tied.

    Raises UserError for rows of another module, and for such as would untie a tied pair: PEFT trains them apart, but
    merges both into the one matrix.
    """
    full = dict(zip((model.embedding_name, model.head_name), model.embedding_and_head, strict=True))
    rows: dict[str, tuple[int, ...]] = {}
    for name, ids in spec.rows.items():
        end = next((last for whole, last in full.items() if whole.endswith(name)), None)
        if end is None:
            known = " and ".join(model.embedding_and_head)
            raise UserError(f"{place}: trainable_token_indices may name {known} only, got {', '.join(spec.rows)}.")
        rows[end] = ids
    first, last = model.embedding_and_head
    if model.shape.tied and last in rows and rows.pop(last) != rows.get(first):
        raise UserError(
            f"{place}: trainable_token_indices must name {first}, or {first} and {last} with the same rows: in "
            f"{base_folder} {first} and {last} are one tied matrix. Train the adapter so, or on a base with an untied "
            "head."
        )
    return replace(spec, rows=rows)


def _refuse_wide(
    model: CausalLM, spec: AdapterSpec, names: list[str], values: Mapping[str, Tensor], place: Path
) -> None:
    """Raises UserError for a rank that no tensor of the file has, before memory for it is asked for."""
    found = {key: tuple(value.shape) for key, value in values.items() if key.endswith(_FIRST)}
    widest = max((shape[0] for shape in found.values() if shape), default=0)
    for name in names:
        if (rank := spec.rank_of(name)) > widest:
            layer = model.get_submodule(name)
            key = f"{PREFIX}{name}{_FIRST[isinstance(layer, nn.Embedding)]}"
            inputs = weight_of(layer).shape[0 if fan_in_fan_out(layer) else 1]
            refuse_difference({key: (rank, inputs)}, {key: found[key]} if key in found else {}, str(place))


def _refuse_unfit(model: CausalLM, spec: AdapterSpec, names: list[str], folder: Path, base_folder: Path) -> None:
    """Rows that the model has not, and a wish to tie that is not followed here."""
    rows = [row for ids in spec.rows.values() for row in ids]
    if rows and max(rows) >= model.shape.rows:
        raise UserError(f"{folder}: trains row {max(rows)}; {base_folder} has {model.shape.rows} rows.")
    one_alone = saves_one_end(model, spec) or model.embedding_name in names
    if model.shape.tied and one_alone and read_config(folder).get("ensure_weight_tying"):
        raise UserError(
            f"{folder / CONFIG}: ensure_weight_tying with one of {' and '.join(model.embedding_and_head)} is not "
            "supported. Train it without, or on both."
        )
