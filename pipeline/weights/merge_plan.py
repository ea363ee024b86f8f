"""What a merge does to a base's files: the adapter is checked against the model's modules, no weight is loaded."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import PREFIX, adapter_layers, tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.dora import DoRALinear
from pipeline.adapters.folder import WEIGHTS, quantization_of, refuse_virtual
from pipeline.adapters.lora import LoRAEmbedding, LoRALinear, factors, fan_in_fan_out
from pipeline.adapters.peft.load import load_adapter, other_embedding
from pipeline.adapters.peft.tensors import COPY
from pipeline.adapters.token_rows import BY_ROWS
from pipeline.errors import UserError
from pipeline.files.shards import Place, places
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.models.quantization.quantized_linear import dequantized, quantizable
from pipeline.models.save import load_tensors
from pipeline.project.params.sections import Quantization
from pipeline.weights.edits import AddLowRank, Edit, Replace, RescaleRows, SetRows, same
from pipeline.weights.streaming import Merge, read_blocks


def plan_merge(base: Path, adapter: Path, trust_remote_code: bool = False, dtype: str | None = None) -> Merge:
    """The merge of `adapter` into the checkpoint at `base`, written in `dtype`: F32, BF16, F16, or each in its own.

    Raises UserError as `load_adapter` does.
    """
    stored = places(base)
    model = skeleton(base, trust_remote_code)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = [f"{end}.weight" for end in (model.embedding_name, model.head_name)] if model.shape.tied else []
    rounded = _rounded(model, quantization_of(adapter))
    edits = edits_of(model, attach_to_meta_model(model, base, stored, adapter))
    names = {name: stored_name(name, stored) or name for name in {*edits, *tied, *rounded}}
    absent = [name for name in tied if names[name] not in stored]
    for name in edits.keys() | rounded:
        _refuse_unlike(names[name], shapes[name], stored, base, may_be_absent=name in tied and len(absent) < 2)
    copies: dict[str, str] = {}
    unties = not same(*(edits.get(name) for name in tied)) if tied else False
    if unties:
        source = next(name for name in tied if name not in absent)
        copies = {names[name]: names[source] for name in tied if name != source}
    else:
        edits = {name: edit for name, edit in edits.items() if name not in absent}
    return Merge(
        base,
        stored,
        {names[name]: edit for name, edit in edits.items()},
        copies,
        unties,
        {names[name]: way for name, way in rounded.items()},
        dtype,
    )


def attach_to_meta_model(model: CausalLM, base: Path, stored: Mapping[str, Place], adapter: Path) -> AdapterSpec:
    """Put the adapter on `model`, the skeleton of `base`, whose tensors are `stored`.

    Raises UserError as `load_adapter` does, for virtual tokens, which change no weight, and for an embedding that came
    with the adapter and is not the base's.
    """
    refuse_virtual(adapter)
    spec = load_adapter(model, base, adapter)
    assert isinstance(spec, AdapterSpec)
    _refuse_other_embedding(adapter, model, stored)
    return spec


def _rounded(model: CausalLM, kind: Quantization) -> dict[str, Callable[[Tensor], Tensor]]:
    if kind == "none":
        return {}
    linears = {name: model.get_submodule(name) for name in quantizable(model)}
    return {
        f"{name}.weight": partial(dequantized, kind=kind, transposed=is_conv1d(one)) for name, one in linears.items()
    }


def edits_of(model: CausalLM, spec: AdapterSpec) -> dict[str, Edit]:
    """By parameter's full name in the plain model."""
    found: dict[str, Edit] = {}
    for name, layer in adapter_layers(model):
        found[f"{name}.weight"] = edit_of(layer)
    for name, module in model.named_modules():
        if isinstance(module, BY_ROWS):
            own = name.rsplit(".", 1)[-1]
            ids = spec.rows[
                own if own in spec.rows else model.embedding_and_head[0]
            ]  # a tied head's are the embedding's
            found[f"{name}.weight"] = SetRows(torch.tensor(ids), module.rows.detach())
    plain = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, parameter in tensors(model, spec).items():
        if (name := key.removeprefix(PREFIX)) in plain:  # trained in full
            found[name] = Replace(parameter.detach())
    return found


def edit_of(layer: LoRALinear | LoRAEmbedding) -> Edit:
    """What a merge does to the layer's weight, as it is stored."""
    if isinstance(layer, DoRALinear):
        return RescaleRows(*factors(layer), layer.scale, layer.magnitude.detach(), fan_in_fan_out(layer.base))
    return AddLowRank(*factors(layer), layer.scale)


def stored_name(name: str, stored: Mapping[str, Place]) -> str | None:
    """What the files call a parameter: as the model does, or without the name of its body; None if they have it not."""
    if name in stored:
        return name
    alike = [one for one in stored if name.endswith(f".{one}") or one.endswith(f".{name}")]
    return alike[0] if len(alike) == 1 else None


def place_of(name: str, model: CausalLM, stored: Mapping[str, Place]) -> Place | None:
    """Where the files have a parameter: one of a tied pair may be stored for both."""
    pair = [f"{end}.weight" for end in (model.embedding_name, model.head_name)] if model.shape.tied else []
    alike = pair if name in pair else []
    return next((stored[found] for one in (name, *alike) if (found := stored_name(one, stored))), None)


def _refuse_unlike(
    name: str, shape: tuple[int, ...], stored: Mapping[str, Place], base: Path, may_be_absent: bool
) -> None:
    if name not in stored and not may_be_absent:
        raise UserError(
            f"{base}: its files have no {name}, which the adapter changes: they name or cut weights otherwise than "
            "transformers does. Open it in transformers and save it anew with save_pretrained."
        )
    if name in stored and stored[name].info.shape != shape:
        raise UserError(f"{base}: {name} has shape {list(stored[name].info.shape)}, config.json says {list(shape)}.")


def _refuse_other_embedding(adapter: Path, model: CausalLM, stored: Mapping[str, Place]) -> None:
    """PEFT writes the base's whole embedding or head beside its LoRA: here only the files have one to compare it
    with."""
    for key, value in load_tensors(adapter / WEIGHTS).items():  # finite: `load_adapter` has read them
        if key.endswith(COPY):
            name = f"{key.removeprefix(PREFIX).removesuffix(COPY)}.weight"
            place = place_of(name, model, stored)
            if place is None or not _is_stored(value, place):
                raise other_embedding(adapter, name)


def _is_stored(value: Tensor, place: Place) -> bool:
    return value.shape == place.info.shape and all(
        torch.equal(value[rows].to(block), block) for rows, block in read_blocks(place)
    )
