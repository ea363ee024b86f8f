"""The memory calculator's prediction for a training step, and settings that would lower it."""

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
from pipeline.training.losses import CHUNK


def suggest_less_memory(model: CausalLM, method: FinetuningMethod, settings: Training, batch: Batch, stage: str) -> str:
    """A sentence with the predicted memory of a step on `batch` and of settings that need less.

    Settings that do not change the result come first, quantization last.
    """
    now, single = predict_peak_memory(model, method, settings, batch), longest_sequence(batch)
    options: list[tuple[str, Training, Batch]] = []
    if settings.gradient_checkpointing != "full":
        options.append(
            (f"{stage}.gradient_checkpointing=full", replace(settings, gradient_checkpointing="full"), batch)
        )
    if settings.batch_size > 1:
        sequences = settings.batch_size * settings.gradient_accumulation_steps
        options.append((f"{stage}.batch_size=1 with gradient_accumulation_steps={sequences}", settings, single))
    if isinstance(settings, AdapterTraining) and settings.quantization == "none":
        quantized = replace(settings, quantization="nf4-dq", precision="bf16")
        options.append((f"{stage}.quantization=nf4-dq", quantized, batch))
    predictions = [(option, predict_peak_memory(model, method, changed, read)) for option, changed, read in options]
    if now is None:
        return f"Lower {stage}.max_length{''.join(f' or set {option}' for option, _ in predictions)}."
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
    model: CausalLM, method: FinetuningMethod, settings: Training, batch: Batch, retained: bool = False
) -> int | None:
    """Predicted peak of a step on `batch`, in bytes of tensors; None if the calculator does not know the architecture.

    `retained`: whether the step computes the retention loss.
    """
    rows, length = batch.ids.shape
    lengths = [method.positions + n for n in batch.segments or [length]]
    span = round(sum(n * n for n in lengths) / sum(lengths)) if batch.segments else 0
    kept_weights = model.kept_attention_weights(lengths) if method.short_attention else None
    all_logits = batch.label_index is None and len(batch.labels) <= CHUNK
    adapter = precision = str(settings.precision)
    if isinstance(settings, AdapterTraining):
        adapter = settings.adapter_precision
        if settings.quantization != "none":
            if precision == "fp32":
                return None  # the calculator supports quantization with 16-bit compute only
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
        checkpointing=settings.gradient_checkpointing,
        loss="divergence" if retained else "full" if all_logits else "chunked",
        label_share=1.0 if retained else len(batch.labels) / batch.ids.numel(),
        chunk=CHUNK,
    )
    try:
        return predict(architecture(model.describe(), "the model"), method, run).peak
    except UserError:
        return None
