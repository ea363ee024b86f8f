"""A training step under fake tensors: the real modules, autograd and optimizer, without weights or accelerator.

`TensorMemoryMeter` measures the peak. Two things differ from a GPU: gradients of fake tensors are accumulated out of
place where autograd could do it in place, and there is no fragmentation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.adapters.attach import add_lora, resolve
from pipeline.adapters.config import AdapterSpec
from pipeline.calc.families.registry import architecture
from pipeline.calc.parameters import projections
from pipeline.calc.settings import FinetuningMethod, TrainingConfig
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.kernels import packed_attention
from pipeline.models.kernels.rms_norm import fuse_rms_norms
from pipeline.models.minigpt.model import MiniGPT, MiniGPTConfig
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.training import losses
from pipeline.training.batches import Batch
from pipeline.training.memory import TensorMemoryMeter
from pipeline.training.optimizer import FlatAdam
from pipeline.training.step import loss_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def traced_peak(config: Mapping[str, Any], method: FinetuningMethod, run: TrainingConfig) -> int:
    """Peak memory of the second step in bytes (the first allocates the optimizer's state). Raises UserError."""
    _refuse_unsupported(config, method, run)
    try:
        return _trace_peak(config, method, run)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"--trace cannot build or run this model: {reason[0]}. Run without --trace to use the formula."
        ) from None


def _trace_peak(config: Mapping[str, Any], method: FinetuningMethod, run: TrainingConfig) -> int:
    live = TensorMemoryMeter()
    with FakeTensorMode():
        model = _build_model(config, run)
        step = (_project_step if _uses_project_step(model, run) else _library_step)(model, method, run)
        live.watch([*model.parameters(), *model.buffers()])
        with live:
            step()
            live.peak = live.now
            step()
    return live.peak


def _refuse_unsupported(config: Mapping[str, Any], method: FinetuningMethod, run: TrainingConfig) -> None:
    adapted = projections(architecture(config, "the config"), method) if method.kind == "lora" else []
    if any(p.experts > 1 or p.name == "gate" for p in adapted):
        raise UserError("--trace does not support LoRA on experts. Leave them out: --targets attention.")
    if run.precision not in DTYPES or run.adapter_precision not in DTYPES:
        raise UserError(f"--trace supports {', '.join(DTYPES)}, got {run.precision}. Change --precision.")
    project_lora = run.trainer or architecture(config, "the config").style.ours
    if method.dora and not project_lora:
        raise UserError("--trace supports DoRA only as implemented here, not in PEFT. Add --optimizer adam-flat.")
    if method.kind not in ("full", "freeze", "lora") or method.embeddings == "new_rows":
        raise UserError("--trace supports full, freeze, LoRA and DoRA, without trainable token rows.")
    if method.kind == "lora" and config.get("model_type") == "gpt2":
        raise UserError("--trace does not support LoRA on GPT-2's Conv1D layers. Use --method full or freeze.")
    if config.get("model_type") == "gpt3":
        raise UserError("--trace does not support GPT-3: no library implements it. Run without --trace.")
    if run.optimizer not in ("adamw", "sgd", "adam-flat") or run.casts != "weights":
        raise UserError("--trace supports the optimizers adamw, adam-flat and sgd, with adapters that cast weights.")


def _project_step(model: CausalLM, method: FinetuningMethod, run: TrainingConfig) -> Callable[[], None]:
    """The step of `training/step.py`, without reading values, which fake tensors do not have."""
    _make_trainable(model, method, DTYPES[run.adapter_precision])
    if isinstance(model, TransformersModel):
        fuse_rms_norms(model, checked=False)
    model.checkpoint_blocks(run.checkpointing)  # type: ignore[arg-type]
    optimizer = FlatAdam(model.train())
    ids, positions = torch.zeros(2, run.batch, run.sequence, dtype=torch.long)
    at = None if run.loss == "full" else torch.zeros(run.labels, dtype=torch.long)
    batch = Batch(ids, positions, torch.zeros(run.labels, dtype=torch.long), at)

    def step() -> None:
        torch.autograd.backward(loss_of(model, batch, run.chunk))
        optimizer.collect_gradients()
        optimizer.step(1e-3)

    return step


def _library_step(model: CausalLM, method: FinetuningMethod, run: TrainingConfig) -> Callable[[], None]:
    """The step of the libraries' documentation: their norms, and an optimizer with state per tensor."""
    _make_trainable(model, method, DTYPES[run.adapter_precision])
    model.train().checkpoint_blocks(run.checkpointing)  # type: ignore[arg-type]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=True) if run.optimizer == "adamw" else torch.optim.SGD(trainable)
    ids = torch.zeros(run.batch, run.sequence, dtype=torch.long)
    labels = torch.zeros(run.batch, run.sequence, dtype=torch.long)

    def step() -> None:
        torch.autograd.backward(_loss(model, ids, labels, run))
        optimizer.step()
        optimizer.zero_grad()

    return step


def _build_model(config: Mapping[str, Any], run: TrainingConfig) -> CausalLM:
    """A model of this architecture, without dropout."""
    if architecture(config, "the config").style.ours:
        if (run.precision, run.attention, run.loss, run.optimizer) != ("fp32", "sdpa", "full", "adamw"):
            raise UserError(
                "--trace supports MiniGPT only with --precision fp32 --attention sdpa --loss full --optimizer adamw."
            )
        return MiniGPT(MiniGPTConfig.from_opt(dict(config), "the config"))
    AttentionInterface.register(FUSED, _fused_attention)
    model = from_config(config, DTYPES[run.precision])
    fused = run.attention == "sdpa" and not _eager_only(model.config)
    implementation = packed_attention.NAME if run.attention == "short" else FUSED if fused else "eager"
    model.use_attention(implementation)
    return model


def _uses_project_step(model: CausalLM, run: TrainingConfig) -> bool:
    return isinstance(model, MiniGPT) or run.trainer


FUSED = "fused_causal"


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA with its causal flag, as on real tensors: with fake ones transformers would build a mask and copy it."""
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
    return out


def _eager_only(config: Any) -> bool:
    """Softcapping and attention sinks, which no kernel of torch supports."""
    return getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss"


def _make_trainable(model: CausalLM, method: FinetuningMethod, dtype: torch.dtype) -> None:
    if method.kind == "full":
        return
    model.requires_grad_(False)
    if method.kind == "lora":
        ranks = dict(method.rank_pattern)
        spec = AdapterSpec(method.rank, method.alpha, (), ranks=ranks, rslora=method.rslora, dora=method.dora)
        add_lora(model, resolve(model, method.targets), spec, dtype, "pissa" if method.pissa else "document")
        train_embeddings = method.embeddings == "all"
    else:
        for block in list(model.blocks)[len(model.blocks) - method.last_blocks :]:
            block.requires_grad_(True)
        train_embeddings = method.train_embeddings
    if train_embeddings:
        for module in (model.embeddings, model.head):
            module.requires_grad_(True)


def _loss(model: CausalLM, ids: Tensor, labels: Tensor, run: TrainingConfig) -> Tensor:
    hidden = model.hidden_states(ids)  # (B, T, D)
    if run.loss == "full":
        return losses.full(model.logits, hidden, labels)
    positions = torch.zeros(run.labels, dtype=torch.long)
    if run.loss == "labels":
        return losses.at_labels(model.logits, hidden, labels, positions)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    return losses.chunked(model.logits, hidden, labels, positions, run.chunk, trained)
