"""A real training step under fake tensors: the same modules, autograd and optimizer, no weights and no accelerator.

The peak is what `LiveBytes` counts. Two things differ from a GPU: fake tensors are summed out of place where autograd
could add in place, and nothing is fragmented.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.adapters.attach import add_lora
from pipeline.adapters.targets import resolve
from pipeline.calc.families import architecture
from pipeline.calc.parameters import projections
from pipeline.calc.settings import Method, Run
from pipeline.errors import UserError
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.training import losses
from pipeline.training.batches import Batch
from pipeline.training.live import LiveBytes
from pipeline.training.loop import loss_of
from pipeline.training.optimizer import FlatAdam

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def traced_peak(config: Mapping[str, Any], method: Method, run: Run) -> int:
    """Bytes at the peak of the second step (the first makes the optimizer's state). Raises UserError."""
    _refuse(config, method, run)
    try:
        return _traced(config, method, run)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"--trace cannot build or run this model: {reason[0]}. The formula needs no trace.") from None


def _traced(config: Mapping[str, Any], method: Method, run: Run) -> int:
    live = LiveBytes()
    with FakeTensorMode():
        ours = architecture(config, "the config").style.ours
        step, model = (_minigpt_step if ours else _transformers_step)(config, method, run)
        live.watch([*model.parameters(), *model.buffers()])
        with live:
            step()
            live.peak = live.now
            step()
    return live.peak


def _refuse(config: Mapping[str, Any], method: Method, run: Run) -> None:
    adapted = projections(architecture(config, "the config"), method) if method.kind == "lora" else []
    if any(p.experts > 1 or p.name == "gate" for p in adapted):
        raise UserError("--trace: this project does not adapt experts yet. Leave them out: --targets attention.")
    if run.precision not in DTYPES or run.adapter_precision not in DTYPES:
        raise UserError(f"--trace runs in {', '.join(DTYPES)}; this project does not train on {run.precision} yet.")
    special = method.dora or method.rank_pattern or method.embeddings == "new_rows"
    if method.kind not in ("full", "freeze", "lora") or special:
        raise UserError("--trace covers full, freeze and LoRA without DoRA, new rows or rank patterns.")
    if method.kind == "lora" and config.get("model_type") == "gpt2":
        raise UserError("--trace: GPT-2's Conv1D layers get no LoRA in this project yet. Use --method full or freeze.")
    if config.get("model_type") == "gpt3":
        raise UserError("--trace: no library builds GPT-3; its shapes are all that is known.")
    if run.optimizer not in ("adamw", "sgd") or run.casts != "weights":
        raise UserError("--trace has the optimizers adamw and sgd, and adapters that cast their weights.")


def _minigpt_step(config: Mapping[str, Any], method: Method, run: Run) -> tuple[Callable[[], None], nn.Module]:
    if (run.precision, run.attention, run.loss, run.optimizer) != ("fp32", "sdpa", "full", "adamw"):
        raise UserError("MiniGPT trains with --precision fp32 --attention sdpa --loss full --optimizer adamw alone.")
    model = MiniGPT(MiniGPTConfig.from_opt(dict(config), "the config")).train()
    _make_trainable(model, method, torch.float32)
    optimizer = FlatAdam(model, 1e-3)
    ids, labels, positions = torch.zeros(3, run.batch, run.sequence, dtype=torch.long)
    batch = Batch(ids, labels, positions, run.tokens)

    def step() -> None:
        torch.autograd.backward(loss_of(model, batch))
        optimizer.step()

    return step, model


def _transformers_step(config: Mapping[str, Any], method: Method, run: Run) -> tuple[Callable[[], None], nn.Module]:
    model = _built(config, run)
    _make_trainable(model, method, DTYPES[run.adapter_precision])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=True) if run.optimizer == "adamw" else torch.optim.SGD(trainable)
    ids = torch.zeros(run.batch, run.sequence, dtype=torch.long)
    labels = torch.zeros(run.batch, run.sequence, dtype=torch.long)

    def step() -> None:
        torch.autograd.backward(_loss(model, ids, labels, run))
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def _built(config: Mapping[str, Any], run: Run) -> Any:
    """The model in training mode, without dropout, checkpointed as `run` says."""
    settings = AutoConfig.for_model(**{**config, **dict.fromkeys(_DROPOUTS, 0.0)})
    fused = run.attention == "sdpa" and not _eager_only(settings)
    AttentionInterface.register(FUSED, _fused_attention)
    model = AutoModelForCausalLM.from_config(
        settings, dtype=DTYPES[run.precision], attn_implementation=FUSED if fused else "eager"
    ).train()
    if run.checkpointing != "none":
        with warnings.catch_warnings():  # transformers 5.24 renames it; 5.0 knows the old name alone
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # re-entrant checkpoints alone need them; frozen blocks would keep tensors
        blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        layers = [block for block in blocks if "Layer" in type(block).__name__ or "Block" in type(block).__name__]
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = run.checkpointed(index)
    return model


FUSED = "fused_causal"


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA with its causal flag, as on real tensors: fake ones make transformers build a mask, and with it copies."""
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
    return out


def _eager_only(config: Any) -> bool:
    """Softcaps and sinks: no kernel of torch computes them."""
    return getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss"


_DROPOUTS = (
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "layerdrop",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_dropout",
    "embd_dropout",
)


def _make_trainable(model: Any, method: Method, dtype: torch.dtype) -> None:
    if method.kind == "full":
        return
    model.requires_grad_(False)
    ours = isinstance(model, MiniGPT)
    ends = [model.embeddings, model.lm_head] if ours else [model.get_input_embeddings(), model.get_output_embeddings()]
    if method.kind == "lora":
        add_lora(model, resolve(model, method.targets), method.rank, method.alpha, dtype)
        trains = method.embeddings == "all"
    else:
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        for block in list(blocks)[len(blocks) - method.last_blocks :]:
            block.requires_grad_(True)
        trains = method.train_embeddings
    if trains:
        for end in ends:
            end.requires_grad_(True)


def _loss(model: Any, ids: Tensor, labels: Tensor, run: Run) -> Tensor:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    cap = getattr(model.config, "final_logit_softcapping", None)
    linear = model.get_output_embeddings()

    def head(rows: Tensor) -> Tensor:
        logits: Tensor = linear(rows)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    if run.loss == "full":
        return losses.full(head, hidden, labels)
    positions = torch.zeros(run.labels, dtype=torch.long)
    if run.loss == "labels":
        return losses.at_labels(head, hidden, labels, positions)
    trained = [p for p in linear.parameters() if p.requires_grad]
    return losses.chunked(head, hidden, labels, positions, run.chunk, trained)
