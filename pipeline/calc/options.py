"""From what a user asks for to a method and a run; what is left open is as suits the model."""

from typing import Any

from pipeline.calc.architecture import Architecture
from pipeline.calc.settings import QLORA, FinetuningMethod, TrainingConfig

METHODS = ("full", "freeze", "lora", "qlora", "prefix", "prompt")  # as they are asked for
CONTEXT = 512 * 2**20  # bytes of CUDA context and kernels, assumed


def parse_method(kind: str, rank: int, alpha: float | None, targets: str, **more: Any) -> FinetuningMethod:
    """`qlora` is LoRA; alpha is the rank where there is none; `targets` are separated by commas; new rows train."""
    if more.get("new_rows") and more.get("embeddings") == "none":
        more["embeddings"] = "new_rows"
    return FinetuningMethod(
        kind="lora" if kind == "qlora" else kind,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        targets=tuple(name.strip() for name in targets.split(",")),
        **more,
    )


def parse_training_config(
    model: Architecture,
    kind: str,
    *,
    sequence: int | None = None,
    precision: str | None = None,
    checkpointing: str | None = None,
    context: int | None = None,
    virtual_tokens: int = 0,
    **more: Any,
) -> TrainingConfig:
    """A step of this model; `context` in bytes. MiniGPT trains in fp32, keeps every tensor, and runs on the CPU.

    The longest sequence by default, after the `virtual_tokens` of prompt tuning, which take places of their own.
    """
    ours, room = model.style.ours, model.context - (virtual_tokens if kind == "prompt" else 0)
    fallback = QLORA if kind == "qlora" else "fp32" if ours else "bf16"
    return TrainingConfig(
        sequence=max(1, min(2048, room)) if sequence is None else sequence,
        precision=precision or fallback,
        checkpointing=checkpointing or ("none" if ours else "full"),
        context=(0 if ours else CONTEXT) if context is None else context,
        **more,
    )
