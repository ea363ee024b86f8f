"""Plans a merge: checks the adapter against the model's modules on the meta device, without loading base weights."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import PREFIX, adapter_layers, tensors
from pipeline.adapters.config import WEIGHTS, AdapterSpec
from pipeline.adapters.folder import quantization_of, refuse_virtual
from pipeline.adapters.lora import DoRALinear, LoRAEmbedding, LoRALinear, factors, fan_in_fan_out
from pipeline.adapters.peft.load import load_adapter, other_embedding
from pipeline.adapters.peft.tensors import COPY
from pipeline.adapters.token_rows import BY_ROWS
from pipeline.errors import UserError
from pipeline.files.shards import TensorLocation, tensor_locations
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.load import skeleton
from pipeline.models.quantization.quantized_linear import dequantized, quantizable
from pipeline.models.save import load_tensors
from pipeline.project.params.sections import Quantization
from pipeline.weights.edits import AddLowRank, Edit, Replace, RescaleRows, SetRows, same_edit
from pipeline.weights.streaming import Merge, read_blocks


def plan_merge(base: Path, adapter: Path, trust_remote_code: bool = False, dtype: str | None = None) -> Merge:
    """The merge of `adapter` into the checkpoint `base`; `dtype` to write: F32, BF16, F16, None: each tensor's own.

    Raises UserError as `load_adapter` does.
    """
    stored = tensor_locations(base)
    model = skeleton(base, trust_remote_code)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = [f"{end}.weight" for end in (model.embedding_name, model.head_name)] if model.shape.tied else []
    quantizers = _quantizers(model, quantization_of(adapter))
    edits = merge_edits(model, attach_to_meta_model(model, base, stored, adapter))
    names = {name: stored_name(name, stored) or name for name in {*edits, *tied, *quantizers}}
    absent = [name for name in tied if names[name] not in stored]
    for name in edits.keys() | quantizers:
        _refuse_mismatch(names[name], shapes[name], stored, base, may_be_absent=name in tied and len(absent) < 2)
    copies: dict[str, str] = {}
    unties = not same_edit(*(edits.get(name) for name in tied)) if tied else False
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
        {names[name]: quantizer for name, quantizer in quantizers.items()},
        dtype,
    )


def attach_to_meta_model(
    model: CausalLM, base: Path, stored: Mapping[str, TensorLocation], adapter: Path
) -> AdapterSpec:
    """Attach the adapter to `model`, which is `base` on the meta device; `stored` are the base's tensors.

    Raises UserError as `load_adapter` does, for virtual tokens, which change no weight, and for an embedding saved with
    the adapter that differs from the base's.
    """
    refuse_virtual(adapter)
    spec = load_adapter(model, base, adapter)
    if not isinstance(spec, AdapterSpec):
        raise UserError(f"{adapter} is no LoRA, so it cannot be merged. Use it on its base: `lora prompt --adapter`.")
    _refuse_other_embedding(adapter, model, stored)
    return spec


def _quantizers(model: CausalLM, kind: Quantization) -> dict[str, Callable[[Tensor], Tensor]]:
    if kind == "none":
        return {}
    linears = {name: model.get_submodule(name) for name in quantizable(model)}
    return {
        f"{name}.weight": partial(dequantized, kind=kind, transposed=is_conv1d(linear))
        for name, linear in linears.items()
    }


def merge_edits(model: CausalLM, spec: AdapterSpec) -> dict[str, Edit]:
    """Full parameter name in the model without adapter → edit."""
    edits: dict[str, Edit] = {}
    for name, layer in adapter_layers(model):
        edits[f"{name}.weight"] = layer_edit(layer)
    for name, module in model.named_modules():
        if isinstance(module, BY_ROWS):
            short_name = name.rsplit(".", 1)[-1]
            # a tied head has the embedding's rows
            ids = spec.rows[short_name if short_name in spec.rows else model.embedding_and_head[0]]
            edits[f"{name}.weight"] = SetRows(torch.tensor(ids), module.rows.detach())
    plain = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, parameter in tensors(model, spec).items():
        if (name := key.removeprefix(PREFIX)) in plain:  # trained in full
            edits[name] = Replace(parameter.detach())
    return edits


def layer_edit(layer: LoRALinear | LoRAEmbedding) -> Edit:
    """The edit of the layer's stored weight."""
    if isinstance(layer, DoRALinear):
        return RescaleRows(*factors(layer), layer.scale, layer.magnitude.detach(), fan_in_fan_out(layer.base))
    return AddLowRank(*factors(layer), layer.scale)


def stored_name(name: str, stored: Mapping[str, TensorLocation]) -> str | None:
    """The name of a parameter in the files: with or without the prefix of the model's body; None if missing."""
    if name in stored:
        return name
    candidates = [other for other in stored if name.endswith(f".{other}") or other.endswith(f".{name}")]
    return candidates[0] if len(candidates) == 1 else None


def find_location(name: str, model: CausalLM, stored: Mapping[str, TensorLocation]) -> TensorLocation | None:
    """Where the files store a parameter; one of a tied pair may be stored for both. None if missing."""
    pair = [f"{end}.weight" for end in (model.embedding_name, model.head_name)] if model.shape.tied else []
    twins = pair if name in pair else []
    return next(
        (stored[stored_as] for candidate in (name, *twins) if (stored_as := stored_name(candidate, stored))), None
    )


def _refuse_mismatch(
    name: str, shape: tuple[int, ...], stored: Mapping[str, TensorLocation], base: Path, may_be_absent: bool
) -> None:
    if name not in stored and not may_be_absent:
        raise UserError(
            f"{base} has no tensor {name}, which the adapter changes: it names or splits weights differently from "
            "transformers. Save the model again with transformers' save_pretrained."
        )
    if name in stored and stored[name].info.shape != shape:
        raise UserError(
            f"{base}: {name} has shape {list(stored[name].info.shape)}, but config.json says {list(shape)}. Copy the "
            "model again."
        )


def _refuse_other_embedding(adapter: Path, model: CausalLM, stored: Mapping[str, TensorLocation]) -> None:
    """Compare an embedding or head that PEFT saved with the LoRA to the base's files: the model has no weights here."""
    for key, value in load_tensors(adapter / WEIGHTS).items():  # `load_adapter` has checked that they are finite
        if key.endswith(COPY):
            name = f"{key.removeprefix(PREFIX).removesuffix(COPY)}.weight"
            location = find_location(name, model, stored)
            if location is None or not _equals_stored(value, location):
                raise other_embedding(adapter, name)


def _equals_stored(value: Tensor, location: TensorLocation) -> bool:
    return value.shape == location.info.shape and all(
        torch.equal(value[rows].to(block), block) for rows, block in read_blocks(location)
    )
