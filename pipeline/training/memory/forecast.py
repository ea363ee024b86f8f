"""What the calculator says of the run that is about to start."""

from dataclasses import replace

import torch

from pipeline.calc.families.registry import architecture
from pipeline.calc.memory import predict
from pipeline.calc.settings import FinetuningMethod, TrainingConfig
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.project.logs.run_log import in_units
from pipeline.project.params.sections import FinetuneLora, FinetuneVirtual, Training
from pipeline.training.batches import Batch
from pipeline.training.losses import CHUNK


def smaller(model: CausalLM, method: FinetuningMethod, settings: Training, batch: Batch, stage: str) -> str:
    """What the calculator says of a step on `batch`, and of each setting that makes it smaller, quality first."""
    now, one = predict_peak_memory(model, method, settings, batch), longest(batch)
    ways: list[tuple[str, Training, Batch]] = []
    if settings.checkpointing != "full":
        ways.append((f"{stage}.checkpointing=full", replace(settings, checkpointing="full"), batch))
    if settings.batch_size > 1:
        whole = settings.batch_size * settings.accumulate
        ways.append((f"{stage}.batch_size=1 with accumulate={whole}", settings, one))
    if isinstance(settings, FinetuneLora) and settings.quantization == "none":
        kept = replace(settings, quantization="nf4-dq", precision="bf16")
        ways.append((f"{stage}.quantization=nf4-dq", kept, batch))
    found = [(words, predict_peak_memory(model, method, changed, read)) for words, changed, read in ways]
    if now is None:
        return f"Lower {stage}.max_length{''.join(f' or set {words}' for words, _ in found)}."
    less = [f"{in_units(size)} with {words}" for words, size in found if size and size < now]
    return f"By the calculator it needs {in_units(now)}; {', '.join(less) or f'lower {stage}.max_length'}."


def longest(batch: Batch) -> Batch:
    """The longest sequence of `batch` as a batch of its own."""
    apart = max(batch.unpack(), key=lambda one: one.ids.numel())
    if len(apart.ids) == 1:
        return apart
    row = torch.arange(apart.ids.shape[1])  # sequences of one length: the first stands for all
    kept = slice(None, len(row)) if apart.at is None else (apart.at < len(row)).to(apart.labels.device)
    return Batch(apart.ids[:1], apart.positions[:1], apart.labels[kept], None if apart.at is None else apart.at[kept])


def predict_peak_memory(
    model: CausalLM, method: FinetuningMethod, settings: Training, batch: Batch, retained: bool = False
) -> int | None:
    """Bytes of tensors at the peak of a step on `batch`; None for an architecture that the calculator does not know."""
    rows, length = batch.ids.shape
    lengths = batch.segments or [length]
    if method.kind == "prompt":
        lengths = [method.virtual_tokens + one for one in lengths]
    span = round(sum(n * n for n in lengths) / sum(lengths)) if batch.segments else 0
    kept_weights = None if method.kind == "prefix" else model.kept_attention_weights(lengths)
    whole = batch.at is None and len(batch.labels) <= CHUNK
    adapter = precision = str(settings.precision)
    if isinstance(settings, FinetuneLora | FinetuneVirtual):
        adapter = settings.adapter_precision
        if settings.quantization != "none":
            if precision == "fp32":
                return None  # the calculator knows few bits beside 16 alone
            precision = settings.quantization
    run = TrainingConfig(
        batch=rows,
        sequence=length,
        span=span,
        sequences=len(batch.segments or ()) or rows,
        scores=rows * (kept_weights or 0),
        attention="sdpa" if kept_weights is None else "short",
        precision=precision,
        adapter_precision=adapter,
        optimizer="adam-flat",
        checkpointing=settings.checkpointing,
        loss="divergence" if retained else "full" if whole else "chunked",
        label_share=1.0 if retained else len(batch.labels) / batch.ids.numel(),
        chunk=CHUNK,
    )
    try:
        return predict(architecture(model.describe(), "the model"), method, run).peak
    except UserError:
        return None
