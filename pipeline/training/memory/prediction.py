"""Memory of a training step: the calculator's prediction, and settings that would lower it."""

import dataclasses

from msgspec.structs import replace

from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.method import FinetuningMethod
from pipeline.calc.settings import TrainingConfig
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.project.logs.run_log import in_units
from pipeline.project.params.sections import AdapterTraining, Training
from pipeline.training.batches import Batch
from pipeline.training.losses import chunk_of, fuses_head


def suggest_less_memory(
    model: CausalLM, method: FinetuningMethod | None, settings: Training, batch: Batch, stage: str
) -> str:
    """A sentence with the predicted memory of a step on `batch` and of settings that need less.

    Settings that do not change the result come first, quantization last.
    """
    options: list[tuple[str, Training, Batch]] = []
    if settings.gradient_checkpointing != "full":
        options.append(
            (f"{stage}.gradient_checkpointing=full", replace(settings, gradient_checkpointing="full"), batch)
        )
    if settings.batch_size > 1:
        sequences = settings.batch_size * settings.gradient_accumulation_steps
        single = longest_sequence(batch)
        options.append((f"{stage}.batch_size=1 with gradient_accumulation_steps={sequences}", settings, single))
    if isinstance(settings, AdapterTraining) and settings.quantization == "none":
        quantized = replace(settings, quantization="nf4-dq", precision="bf16")
        options.append((f"{stage}.quantization=nf4-dq", quantized, batch))
    now = predict_peak_memory(model, method, settings, batch)
    if now is None:
        return f"Lower {stage}.max_length{''.join(f' or set {option}' for option, *_ in options)}."
    predictions = [(option, predict_peak_memory(model, method, changed, read)) for option, changed, read in options]
    smaller = [f"{in_units(size)} with {option}" for option, size in predictions if size and size < now]
    return f"The calculator predicts {in_units(now)}; {', '.join(smaller) or f'lower {stage}.max_length'}."


def longest_sequence(batch: Batch) -> Batch:
    """A batch of only the longest sequence of `batch`."""
    longest = max(batch.unpack(), key=lambda part: part.ids.numel())
    if len(longest.ids) == 1:
        return longest
    index, length = longest.label_index, longest.ids.shape[1]  # equal lengths: take the first sequence
    labels = slice(None, length) if index is None else (index < length).to(longest.labels.device)
    label_index = None if index is None else index[labels]
    return Batch(longest.ids[:1], longest.positions[:1], longest.labels[labels], label_index)


def predict_peak_memory(
    model: CausalLM, method: FinetuningMethod | None, settings: Training, batch: Batch, retained: bool = False
) -> int | None:
    """Predicted peak of a step on `batch`, in bytes of tensors; None if the calculator does not know the architecture,
    or the method.

    `retained`: whether the step computes the retention loss.
    """
    if method is None:
        return None
    rows, length = batch.ids.shape
    lengths = batch.segments or [length]
    lengths = [method.positions + n for n in lengths]
    # in a packed row a token attends to its own sequence only: on average Σn²/Σn keys
    span = round(sum(n * n for n in lengths) / sum(lengths)) if batch.segments else 0
    kept_weights = model.kept_attention_weights(lengths) if method.short_attention else None
    all_logits = not batch.in_chunks and batch.label_index is None and len(batch.labels) <= chunk_of(model)
    loss = "divergence" if retained else "full" if all_logits else "chunked"
    if not (retained or batch.in_chunks) and fuses_head(model):
        loss = "fused"
    precision = str(settings.precision)
    adapter = getattr(settings, "adapter_precision", precision)
    if (quantization := getattr(settings, "quantization", "none")) != "none":
        if precision == "fp32":
            return None  # the calculator supports quantization with 16-bit compute only
        precision = quantization
    run = TrainingConfig(
        batch=rows,
        sequence=length,
        span=span,
        sequences=len(batch.segments or ()) or rows,
        scores=rows * (kept_weights or 0),
        attention="sdpa" if kept_weights is None else "short",
        precision=precision,
        adapter_precision=adapter,
        # on a CPU paged state is where all else is
        optimizer=settings.optimizer.removeprefix("paged-") if model.device.type == "cpu" else settings.optimizer,
        cpu=model.device.type == "cpu",
        neftune_alpha=0.0 if retained else settings.neftune_alpha,
        checkpointing=settings.gradient_checkpointing,
        loss=loss,
        label_share=1.0 if retained else len(batch.labels) / batch.ids.numel(),
        chunk=chunk_of(model),
    )
    if retained and hasattr(method, "lora_dropout"):  # without noise
        method = dataclasses.replace(method, lora_dropout=0.0)  # type: ignore[call-arg]
    try:
        return predict(architecture(model.describe(), "the model"), method, run).peak
    except UserError:
        return None
