"""A configuration as a section of params.yaml, which trains MiniGPT, and back."""

from typing import Any

from pipeline.calc.parameters import ranks
from pipeline.calc.precision import precision
from pipeline.calc.sources import built_in
from pipeline.errors import UserError
from pipeline.params import Params
from tui.calculation import Asked, Result


def asked_for(params: Params) -> Asked:
    """What `finetune_lora` trains: MiniGPT, one window after the other."""
    lora = params.finetune_lora
    return Asked(
        model="minigpt",
        rank=str(lora.rank),
        alpha=f"{lora.alpha:g}",
        targets=", ".join(lora.target_modules),
        embeddings=lora.train_embeddings,
        batch=str(lora.batch_size),
        sequence=str(lora.window),
    )


def settings_of(asked: Asked, result: Result, params: Params) -> dict[str, Any]:
    """`section.key` → value of what this project would train so. Raises UserError for what it cannot train."""
    method, run = result.method, result.run
    if asked.method not in ("full", "freeze", "lora"):
        raise UserError(f"{asked.method} is not trainable here yet. Choose lora, freeze or full.")
    if precision(run.precision).quantized:
        raise UserError(f"{run.precision} weights are not trainable here yet. Choose fp32 or bf16.")
    values: dict[str, Any] = {"batch_size": run.batch}
    if method.kind == "freeze":
        _refuse_blocks(method.last_blocks, params)
        values |= {"last_blocks": method.last_blocks, "train_embeddings": method.train_embeddings}
    if method.kind == "lora":
        try:
            ranks(built_in("minigpt").shapes, method)
        except UserError as error:
            raise UserError(f"MiniGPT, which this project trains, cannot have these targets. {error}") from None
        values |= {"rank": method.rank, "alpha": method.alpha, "target_modules": list(method.targets)}
        values["train_embeddings"] = method.embeddings
    return {f"finetune_{method.kind}.{key}": value for key, value in values.items()}


def _refuse_blocks(last_blocks: int, params: Params) -> None:
    if last_blocks > params.pretrain.layers:
        raise UserError(
            f"last-blocks must be at most {params.pretrain.layers}, the blocks of MiniGPT (pretrain.layers), "
            f"got {last_blocks}."
        )


def differences(params: Params, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`section.key` → (value now, value then) of what is not so already."""
    found = {}
    for key, new in values.items():
        section, _, name = key.partition(".")
        old = getattr(getattr(params, section), name)
        old = list(old) if isinstance(old, tuple) else old
        if old != new:
            found[key] = (old, new)
    return found
