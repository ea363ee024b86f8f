"""What the calculator says of the run that is about to start."""

from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.settings import Method, Run
from pipeline.errors import UserError
from pipeline.models.causal import CausalLM
from pipeline.models.minigpt import MiniGPT
from pipeline.models.short_attention import LONGEST, blocks
from pipeline.params import FinetuneLora, FinetuneVirtual, Training
from pipeline.training.batches import Batch
from pipeline.training.losses import CHUNK


def forecast(model: CausalLM, method: Method, settings: Training, batch: Batch, retained: bool = False) -> int | None:
    """Bytes of tensors at the peak of a step on `batch`; None for an architecture that the calculator does not know."""
    rows, length = batch.ids.shape
    lengths = batch.segments or [length]
    if method.kind == "prompt":
        lengths = [method.virtual_tokens + one for one in lengths]
    span = round(sum(n * n for n in lengths) / sum(lengths)) if batch.segments else 0
    short = model.device.type == "cpu" and max(lengths) <= LONGEST and method.kind != "prefix"
    whole = batch.at is None and len(batch.labels) <= CHUNK
    adapter = precision = str(settings.precision)
    if isinstance(settings, FinetuneLora | FinetuneVirtual):
        adapter = settings.adapter_precision
        if settings.quantization != "none":
            if precision == "fp32":
                return None  # the calculator knows few bits beside 16 alone
            precision = settings.quantization
    run = Run(
        batch=rows,
        sequence=length,
        span=span,
        sequences=len(batch.segments or ()) or rows,
        scores=rows * sum(block.weights for block in blocks(lengths)),
        attention="short" if short and not isinstance(model, MiniGPT) else "sdpa",
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
