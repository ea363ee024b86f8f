"""The methods of bench/methods.py as PEFT's documentation sets them up."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench.training import batches

ENDS = ["embed_tokens", "lm_head"]
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
OPTIONS: dict[str, dict[str, Any]] = {"DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa"}}


def peft_of(folder: Path, method: str, virtual: int) -> tuple[Callable[[], object], Callable[[], Iterable[Tensor]]]:
    """A step, and what is kept from one to the next: the loop as the documentation writes it."""
    model = adapted(opened(folder, method), method, virtual).train()
    optimizer = _optimizer(model, method)
    found, number = batches(), count()

    def step() -> float:
        (batch,) = found[next(number)]
        optimizer.zero_grad()
        places = {} if method in ("prefix", "prompt") else {"position_ids": batch.positions}  # there it takes none
        logits = model(input_ids=batch.ids, **places).logits[:, -batch.ids.shape[1] :]  # prompt: without its own
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.item()

    return step, lambda: _held(model, optimizer)


def opened(folder: Path, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base; for QLoRA the linears of its blocks in four bits."""
    options: dict[str, Any] = {"dtype": dtype}
    if method.startswith("QLoRA"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def adapted(model: Any, method: str, virtual: int) -> nn.Module:
    """With the method's adapter; for full fine-tuning as it is, but for the positions, which MiniGPT computes."""
    if method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_positions" not in name)
        return model  # type: ignore[no-any-return]
    if method in ("prefix", "prompt"):
        return get_peft_model(model, virtual_config(method, virtual))  # type: ignore[no-any-return]
    own = OPTIONS.get(method, {})
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=1, target_modules=TARGETS, modules_to_save=ENDS, **own)
    return get_peft_model(model, config)  # type: ignore[no-any-return]


def virtual_config(method: str, virtual: int) -> PeftConfig:
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=virtual)


def _optimizer(model: nn.Module, method: str) -> torch.optim.Optimizer:
    if method == "LoRA+":
        made: torch.optim.Optimizer = create_loraplus_optimizer(
            model, torch.optim.Adam, lr=1e-3, loraplus_lr_ratio=16.0
        )
        return made
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad
        yield from _scales(getattr(tensor, "quant_state", None))
    for state in optimizer.state.values():
        yield from (tensor for tensor in state.values() if isinstance(tensor, Tensor))


def _scales(state: Any) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside a weight's codes, and beside the codes of its scales."""
    if state is not None:
        yield from (tensor for tensor in vars(state).values() if isinstance(tensor, Tensor))
        yield from _scales(getattr(state, "state2", None))
