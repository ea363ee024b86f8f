"""Loads models with or without an adapter and prompts them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.batched import lora_layers
from pipeline.adapters.folder import quantization_of
from pipeline.adapters.peft import EACH_TIME, Reading, load_adapter
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.models.base import CausalLM, LowBitLinear
from pipeline.models.device import fast_precision, move_for_inference
from pipeline.models.generate import GREEDY, Sampling, encode_prompt, finite, generate
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.load import load_base
from pipeline.project.params.sections import Quantization
from pipeline.project.stage_graph import Project


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for prompts, with its name and folders."""

    name: str
    model: CausalLM
    tokenizer: Tokenizer
    base: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class TokenProbability:
    """A candidate for the next token."""

    token: str
    probability: float


def load(
    base: Path,
    adapter: Path | None = None,
    name: str = "",
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    make_room: Callable[[], bool] = lambda: False,
    reading: Reading = EACH_TIME,
) -> LoadedModel:
    """The checkpoint at `base`, with the adapter at `adapter` if given, ready on the best device.

    The base is quantized as when the adapter was trained, or as `quantization` says. `make_room`:
    as of `move_for_inference`. Raises UserError, and never returns the base alone if the adapter
    does not load.
    """
    model, tokenizer = load_base(
        base, None, trust_remote_code, quantization or quantization_of(adapter)
    )
    # before the adapter, whose tensors go where the layers are
    move_for_inference(model, make_room)
    if not uses_cpu_kernels(model.device):
        _leave_bf16(model)
        model.prepare_for_accelerator(model.device)
    if adapter is not None:
        attach_for_inference(model, base, adapter, reading)
    return LoadedModel(name or (adapter or base).name, model.eval(), tokenizer, base, adapter)


def _leave_bf16(model: CausalLM) -> None:
    """Cast what is in bf16 to fp16 on a GPU that emulates bf16, if all of it is in fp16's range."""
    stored = [t for t in chain(model.parameters(), model.buffers()) if t.dtype == torch.bfloat16]
    if fast_precision(model.device) != "fp16":
        return
    if any(t.abs().max() > torch.finfo(torch.float16).max for t in stored if t.numel()):
        logging.getLogger(__name__).warning(
            "this GPU has no bf16 instructions, and the weights are too large for fp16: answers are "
            "slow"
        )
        return
    for tensor in stored:
        tensor.data = tensor.data.half()
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            module.dtype = model.dtype


def attach_for_inference(model: CausalLM, base: Path, adapter: Path, reading: Reading) -> Any:
    """`load_adapter`. An accelerator gets A and B as products read them: no token casts them."""
    spec = load_adapter(model, base, adapter, reading)
    if not uses_cpu_kernels(model.device):
        for _, _, layer in lora_layers(model):
            for factor in (layer.lora_A, layer.lora_B):
                factor.data = factor.to(model.dtype)
    return spec


def variant_folders(project: Project) -> dict[str, tuple[Path, Path | None]]:
    """Base and adapter of every model that the project has, in the report's order."""
    variants = {}
    for name, (base, adapter) in project.variants.items():
        folders = project.artifact(base), project.artifact(adapter) if adapter else None
        if all(folder is None or folder.is_dir() for folder in folders):
            variants[name] = folders
    return variants


def free(loaded: LoadedModel) -> None:
    """Free the weights, whoever holds the model; the head stays, to compare other models with."""
    for module in loaded.model.body.modules():
        module._parameters.clear()
        module._buffers.clear()


def encode(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    """The prompt's ids. Raises UserError as `encode_prompt` does."""
    return encode_prompt(loaded.name, loaded.model, loaded.tokenizer, text)


@torch.no_grad()
def next_probabilities(loaded: LoadedModel, text: str) -> Tensor:
    """Probabilities of the next token, (V,), on the CPU. Raises UserError."""
    model = loaded.model
    hidden = model.hidden_states(torch.tensor([encode(loaded, text)], device=model.device))
    return finite(model.logits(hidden[0, -1]).float().cpu()).softmax(0)


def top_k(loaded: LoadedModel, text: str, k: int) -> list[TokenProbability]:
    """The `k` most likely next tokens, in descending order."""
    return top_tokens(loaded, next_probabilities(loaded, text), k)


def top_tokens(loaded: LoadedModel, probabilities: Tensor, k: int) -> list[TokenProbability]:
    """The `k` most likely tokens of probabilities (V,), in descending order."""
    values, ids = probabilities.topk(min(k, len(loaded.tokenizer)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [TokenProbability(loaded.tokenizer.word(id_), value) for id_, value in pairs]


def continued(loaded: LoadedModel, text: str, limit: int = 20, sampling: Sampling = GREEDY) -> str:
    """The generated text after `text`, up to an end token or `limit` tokens."""
    decode_next = loaded.tokenizer.stream()
    ids = generate(loaded.model, encode(loaded, text), loaded.tokenizer.end_ids, limit, sampling)
    return "".join(map(decode_next, ids))


def complete(loaded: LoadedModel, text: str, limit: int = 20) -> str:
    """The greedy continuation without white space around it."""
    return continued(loaded, text, limit).strip()
