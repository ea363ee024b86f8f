"""A merge of models that are in memory, to compare a merge of files with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.lora import EmbeddingRows, HeadRows, LoRAEmbedding, LoRALinear, weight_of
from pipeline.models.base import CausalLM
from pipeline.models.quantized_linear import QuantizedLinear
from pipeline.weights.blocks import blocks
from pipeline.weights.edits import RescaleRows
from pipeline.weights.merge_plan import layer_edit


def merged_model(model: CausalLM) -> CausalLM:
    """A new plain model with the adapter's changes in its weights; `model` is untouched.

    What the adapter leaves alone is shared with `model`; what is kept in few bits is so no longer.
    A tied pair stays one matrix, changed once; it is untied only where LoRA changed the head alone.
    """
    memo: dict[int, Any] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    plain = copy.deepcopy(model, memo)
    turned = model.describe().get("model_type") == "gpt2"
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoRALinear | LoRAEmbedding):
            plain.set_submodule(name, merged(module, turned))
        elif isinstance(module, EmbeddingRows | HeadRows):
            plain.set_submodule(name, _with_rows(module))
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain.set_submodule(name, unquantized(module, module.weight_in(torch.float32), turned))
    if plain.shape.tied:
        embedding, head = plain.embeddings, plain.head
        if torch.equal(weight_of(embedding), weight_of(head)):
            head.weight = embedding.weight
        else:
            plain.set_rows(plain.shape.rows, tied=False)
    return plain.eval()


def _with_rows(module: EmbeddingRows | HeadRows) -> nn.Module:
    plain = copy.copy(module.base)
    plain._parameters = dict(module.base._parameters)
    weight = weight_of(plain).detach().clone()
    ids = module.ids if isinstance(module, HeadRows) else (module.slot >= 0).nonzero().flatten()
    order = torch.arange(len(ids)) if isinstance(module, HeadRows) else module.slot[ids]
    weight[ids] = module.rows.detach()[order]
    plain.weight = nn.Parameter(weight)
    return plain


def merged(layer: LoRALinear | LoRAEmbedding, turned: bool) -> nn.Module:
    """The layer as a new plain one of the base's kind; `layer` is untouched."""
    base = layer.base
    whole = (
        base.weight_in(torch.float32)
        if isinstance(base, QuantizedLinear)
        else weight_of(base).detach()
    )
    parts = [(rows, whole[rows]) for rows in blocks(*whole.shape)]
    edit = layer_edit(layer)
    edit = edit.with_norms(parts) if isinstance(edit, RescaleRows) else edit
    weight = torch.cat([edit(part, rows) for rows, part in parts])
    if isinstance(layer.base, QuantizedLinear):
        return unquantized(layer.base, weight, turned)
    plain = copy.copy(layer.base)  # a new module; what it holds is replaced, not written to
    plain._parameters = dict(layer.base._parameters)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def unquantized(layer: QuantizedLinear, weight: Tensor, turned: bool) -> nn.Module:
    """A plain linear with this weight (O, I); of GPT-2's kind where it is `turned`."""
    outputs, inputs = weight.shape
    weight = weight.to(layer.dtype)
    linear: nn.Module = Conv1D(outputs, inputs) if turned else nn.Linear(inputs, outputs)
    stored = weight.T.contiguous() if turned else weight
    linear._parameters = {"weight": nn.Parameter(stored, requires_grad=False), "bias": layer.bias}
    return linear
