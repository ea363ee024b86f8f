"""A training step under fake tensors: real modules, autograd and optimizer, no weights.

`TensorMemoryMeter` measures the peak. Two things differ from a GPU: gradients of fake tensors are
accumulated out of place where autograd could do it in place, and there is no fragmentation.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.adapters.attach import add_lora, resolve
from pipeline.adapters.config import AdapterSpec
from pipeline.calc.architecture import Architecture
from pipeline.calc.families import architecture
from pipeline.calc.method import FinetuningMethod, projections
from pipeline.calc.settings import TrainingConfig
from pipeline.errors import UserError, first_line, is_out_of_memory
from pipeline.files.artifact import refuse_long_lists
from pipeline.models.base import CausalLM
from pipeline.models.kernels import packed_attention
from pipeline.models.kernels.accelerator import GatedProduct, fuse_gates
from pipeline.models.kernels.accelerator.products import fuse_linears
from pipeline.models.kernels.rms_norm import fuse_rms_norms
from pipeline.models.load import DTYPES
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.project.params.sections import Init, Training
from pipeline.training.batches import Batch
from pipeline.training.losses import cross_entropy, mean_loss
from pipeline.training.memory.prediction import TensorMemoryMeter
from pipeline.training.noise import training_noise
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.step import loss_of
from pipeline.training.task import rule_of


class _Noisy(Training, frozen=True, kw_only=True):
    lora_dropout: float = 0.0


def traced_peak(config: Mapping[str, Any], method: FinetuningMethod, run: TrainingConfig) -> int:
    """Peak memory of the second step in bytes.

    The first allocates the optimizer's state. Raises UserError.
    """
    _refuse_unsupported(config, method, run)
    refuse_long_lists(config, "the config")
    live = TensorMemoryMeter()
    # it prints the traceback of what is raised below
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True
    try:
        with FakeTensorMode():
            model = _build_model(config, run)
            step = _training_step(model, method, run)
            live.watch([*model.parameters(), *model.buffers()])
            with live:
                step()
                live.peak = live.now  # between steps, with the optimizer's state
                step()
    except Exception as error:  # whatever the libraries raise for a config
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"--trace cannot build or run this model: {first_line(error)}. Run without --trace to "
            "use the formula."
        ) from None
    return live.peak


def _refuse_unsupported(
    config: Mapping[str, Any], method: FinetuningMethod, run: TrainingConfig
) -> None:
    model = architecture(config, "the config")
    adapted = projections(model, method)
    if any(p.experts > 1 or p.name == "gate" for p in adapted):
        raise UserError(
            "--trace does not support LoRA on experts. Leave them out: --targets attention."
        )
    if run.precision not in DTYPES or run.adapter_precision not in DTYPES:
        raise UserError(
            f"--trace supports {', '.join(DTYPES)}, got {run.precision}. Change --precision."
        )
    _refuse_other_kernels(model, run)
    if run.loss == "divergence":
        raise UserError("--trace cannot run the retention loss. Use --loss chunked.")
    linears = chain.from_iterable(block.linears for block in model.blocks)
    if run.precision != "bf16" and any(linear.experts > 1 for linear in linears):
        # torch has no fake product of experts in other dtypes, though GPUs have a real one
        raise UserError(
            f"--trace runs a mixture of experts in bf16, got {run.precision}. Add --precision bf16."
        )
    project_lora = run.ours or model.style.ours
    if (getattr(method, "dora", False) or getattr(method, "lora_dropout", 0)) and not project_lora:
        raise UserError(
            "--trace supports DoRA and dropout only as implemented here, not in PEFT. Use "
            "--trainer ours."
        )
    if method.name not in ("full", "freeze", "lora") or getattr(method, "new_rows", False):
        raise UserError(
            "--trace supports full, freeze, LoRA and DoRA, without trainable token rows."
        )
    if method.name == "lora" and config.get("model_type") == "gpt2":
        raise UserError(
            "--trace does not support LoRA on GPT-2's Conv1D layers. Use --method full or freeze."
        )
    if config.get("model_type") == "gpt3":
        raise UserError(
            "--trace does not support GPT-3: no library implements it. Run without --trace."
        )
    if run.casts != "weights" or run.trainer not in ("ours", "torch"):
        raise UserError(
            "--trace supports the trainers ours and torch, with adapters that cast weights."
        )
    if run.optimizer.startswith("paged") or (
        not run.ours and run.optimizer not in ("adamw", "sgd")
    ):
        raise UserError(
            "--trace supports the optimizers adamw and sgd, and adamw-8bit and muon with --trainer "
            "ours."
        )


def _refuse_other_kernels(model: Architecture, run: TrainingConfig) -> None:
    """Raises UserError where a CPU has no kernel like the GPU's: the fallback's trace differs."""
    if any(block.kind == "delta" for block in model.blocks):
        raise UserError(
            "--trace has no kernel for gated delta nets, whose fallback needs far more. Run "
            "without --trace."
        )
    if run.loss == "fused":
        raise UserError("--trace cannot run Liger's kernels. Use --loss chunked.")
    sizes = {(heads.size, heads.value_size) for heads in map(model.heads_of, model.blocks)}
    if run.attention == "sdpa" and any(size != value for size, value in sizes):
        raise UserError(
            "--trace needs values as wide as keys for fused attention on a CPU. Add --attention "
            "eager."
        )


def _training_step(
    model: CausalLM, method: FinetuningMethod, run: TrainingConfig
) -> Callable[[], None]:
    """This project's step, or the libraries' documented one: their norms, state per tensor.

    Neither reads a value, which fake tensors do not have.
    """
    ours = isinstance(model, MiniGPT) or run.ours
    _make_trainable(model, method, DTYPES[run.adapter_precision])
    # as `prepare_cpu_training` and `prepare_for_accelerator` do with real tensors
    if run.ours and isinstance(model, TransformersModel):
        fuse_rms_norms(model, checked=False)
        if not run.cpu:
            fuse_linears(model)
            fuse_gates(model, [GatedProduct.apply], torch.device("cpu"), checked=False)
    model.train().checkpoint_blocks(run.checkpointing)  # type: ignore[arg-type]
    if ours:
        narrow = DTYPES[run.precision] if run.keeps_copies else None
        flat = FlatOptimizer(model, rule=rule_of(run.optimizer), narrow=narrow)
        ids, positions = torch.zeros(2, run.rows, run.length, dtype=torch.long)
        at = None if run.loss == "full" else torch.zeros(run.labels, dtype=torch.long)
        batch = Batch(ids, positions, torch.zeros(run.labels, dtype=torch.long), at)

        settings = _Noisy(
            neftune_alpha=run.neftune_alpha, lora_dropout=getattr(method, "lora_dropout", 0.0)
        )

        noisy = settings.neftune_alpha or settings.lora_dropout
        lengths = [run.length] * run.rows if noisy else []

        def our_step() -> None:
            with training_noise(model, [settings]) as noises, ExitStack() as stack:
                for noise in noises:
                    stack.enter_context(noise.during(lengths))
                torch.autograd.backward(
                    loss_of(model, batch, run.labels if run.loss == "full" else run.chunk)
                )
            flat.collect_gradients()
            flat.step(1e-3)

        return our_step
    trainable = [p for p in model.parameters() if p.requires_grad]
    if run.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trainable, fused=True)
    else:
        optimizer = torch.optim.SGD(trainable)
    ids, labels = torch.zeros(2, run.rows, run.length, dtype=torch.long)
    positions = torch.zeros(run.labels, dtype=torch.long)

    def library_step() -> None:
        hidden = model.hidden_states(ids)  # (B, T, D)
        # rows, targets and logits get no names: a name would keep them alive during backward
        if run.loss == "full":
            loss = F.cross_entropy(model.logits(hidden).float().flatten(0, 1), labels.flatten())
        elif run.loss == "labels":
            loss = F.cross_entropy(
                model.logits(_rows(hidden, positions)).float(), labels.flatten()[positions]
            )
        else:
            loss = mean_loss(
                model,
                cross_entropy(model.logits),
                _rows(hidden, positions),
                labels.flatten()[positions],
                run.chunk,
            )
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return library_step


def _rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states (N, D) of the labelled tokens, from those of all (B, T, D)."""
    return hidden.flatten(0, 1).index_select(0, positions)


def _build_model(config: Mapping[str, Any], run: TrainingConfig) -> CausalLM:
    """A model of this architecture, without dropout."""
    if architecture(config, "the config").style.ours:
        asked = (run.precision, run.attention, run.loss, run.optimizer)
        if asked != ("fp32", "sdpa", "full", "adamw"):
            raise UserError(
                "--trace supports MiniGPT only with --precision fp32 --attention sdpa --loss full "
                "--optimizer adamw."
            )
        return MiniGPT(MiniGPTConfig.from_opt(dict(config), "the config"))
    AttentionInterface.register(FUSED, _fused_attention)
    model = from_config(config, DTYPES[run.precision])
    # no kernel of torch supports softcapping and attention sinks
    softcapped = getattr(model.config, "attn_logit_softcapping", None) is not None
    fused = run.attention == "sdpa" and not softcapped and model.config.model_type != "gpt_oss"
    implementation = FUSED if fused else "eager"
    if run.attention == "short":
        implementation = packed_attention.NAME
    model.use_attention(implementation)
    return model


FUSED = "fused_causal"


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA with its causal flag, as on real tensors.

    With fake ones transformers would build a mask and copy it.
    """
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
    return out


def _make_trainable(model: CausalLM, method: Any, dtype: torch.dtype) -> None:
    if method.name == "full":
        return
    model.requires_grad_(False)
    if method.name == "lora":
        spec = AdapterSpec(
            method.rank,
            method.effective_alpha,
            (),
            ranks=dict(method.rank_pattern),
            rslora=method.rslora,
            dora=method.dora,
            dropout=method.lora_dropout,
        )
        init: Init = "pissa" if method.pissa else "document"
        add_lora(model, resolve(model, method.targets), spec, dtype, init)
        train_embeddings = method.embeddings == "all"
    else:
        for block in list(model.blocks)[len(model.blocks) - method.last_blocks :]:
            block.requires_grad_(True)
        train_embeddings = method.train_embeddings
    if train_embeddings:
        for module in (model.embeddings, model.head):
            module.requires_grad_(True)
