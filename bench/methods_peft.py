"""The methods of bench/methods.py, set up as in PEFT's documentation."""

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
OPTIONS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
}


def peft_side(
    folder: Path, method: str, virtual: int
) -> tuple[Callable[[], object], Callable[[], Iterable[Tensor]]]:
    """A step of the documentation's training loop, and the tensors that persist between steps."""
    model = add_adapter(load_base(folder, method), method, virtual).train()
    optimizer = _optimizer(model, method)
    batch_list, step_numbers = batches(), count()

    def step() -> float:
        (batch,) = batch_list[next(step_numbers)]
        optimizer.zero_grad()
        # with virtual tokens PEFT numbers the positions itself
        positions = {} if method in ("prefix", "prompt") else {"position_ids": batch.positions}
        # without the prompt's logits
        logits = model(input_ids=batch.ids, **positions).logits[:, -batch.ids.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.item()

    return step, lambda: _persistent_tensors(model, optimizer)


def load_base(folder: Path, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base; for QLoRA, with the linears of its blocks in NF4."""
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


def add_adapter(model: Any, method: str, virtual: int) -> nn.Module:
    """The model with the method's adapter; full fine-tuning freezes the positions, which MiniGPT
    computes.
    """
    if method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_positions" not in name)
        return model  # type: ignore[no-any-return]
    if method in ("prefix", "prompt"):
        return get_peft_model(model, virtual_config(method, virtual))  # type: ignore[no-any-return]
    options = OPTIONS.get(method, {})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=1,
        target_modules=TARGETS,
        modules_to_save=ENDS,
        **options,
    )
    return get_peft_model(model, config)  # type: ignore[no-any-return]


def virtual_config(method: str, virtual: int) -> PeftConfig:
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=virtual)


def _optimizer(model: nn.Module, method: str) -> torch.optim.Optimizer:
    if method == "LoRA+":
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model, torch.optim.Adam, lr=1e-3, loraplus_lr_ratio=16.0
        )
        return optimizer
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def _persistent_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad
        yield from _quantization_tensors(getattr(tensor, "quant_state", None))
    for state in optimizer.state.values():
        yield from (tensor for tensor in state.values() if isinstance(tensor, Tensor))


def _quantization_tensors(state: Any) -> Iterator[Tensor]:
    """Tensors of a bitsandbytes quant_state, and of the nested state of its quantized scales."""
    if state is not None:
        yield from (tensor for tensor in vars(state).values() if isinstance(tensor, Tensor))
        yield from _quantization_tensors(getattr(state, "state2", None))
