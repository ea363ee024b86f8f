"""Memory of a training step, by part at its peak, and of inference."""

from dataclasses import dataclass, fields, replace

from pipeline.calc.architecture import Architecture
from pipeline.calc.parameters import magnitudes, projections, ranks, trained_parts
from pipeline.calc.precision import precision
from pipeline.calc.settings import OPTIMIZERS, FinetuningMethod, TrainingConfig, validate
from pipeline.calc.simulator.step import run_step
from pipeline.calc.simulator.tape import Tape
from pipeline.errors import UserError


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, which is in the phase `where`; the parts sum to `peak`."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    where: str

    @property
    def peak(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {part: getattr(self, part) for part in PARTS}


PARTS = tuple(field.name for field in fields(Memory) if field.name != "where")


def predict(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> Memory:
    """Memory of one training step. Raises UserError for invalid settings."""
    validate(method, run)
    refuse_impossible(model, method, run)
    tape = step(model, method, run)
    flat = model.style.ours or run.trainer  # gradients are one persistent flat buffer
    groups = _trained_counts(model, method, run, flat)
    trained = sum(count * width for count, width in groups)
    state_width = OPTIMIZERS[run.optimizer]
    memory = Memory(
        weights=weight_bytes(model, run.precision),
        adapter=sum(count * width for count, width in groups[:2])
        + (_buffer_bytes(model, method, groups) if flat else 0),
        gradients=tape.at_peak.get("gradients", 0) + (trained if flat else 0),
        optimizer=round(sum(count * state_width(width) for count, width in groups)),
        activations=tape.at_peak.get("activations", 0),
        logits=tape.at_peak.get("logits", 0),
        overhead=run.context,
        where=tape.peak_phase,
    )
    if run.optimizer == "adamw-foreach" and 2 * trained > tape.peak:
        updating = replace(memory, gradients=trained, activations=0, logits=0, where="optimizer's update")
        return replace(updating, optimizer=memory.optimizer + trained)
    return memory


def _trained_counts(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, flat: bool
) -> list[tuple[int, int]]:
    """(count, bytes each) of the adapter without DoRA's magnitudes, of the magnitudes (ours are fp32), of the base."""
    adapter, base = trained_split(model, method)
    width, lengths = precision(run.adapter_precision).compute, magnitudes(model, method)
    return [(adapter - lengths, width), (lengths, 4 if flat else width), (base, run.width)]


def _buffer_bytes(model: Architecture, method: FinetuningMethod, groups: list[tuple[int, int]]) -> int:
    """Bytes of our layers' buffers: DoRA's ‖W‖² in fp32, PiSSA's initial A and B."""
    (_, width), (lengths, _), _ = groups
    matrices = sum(p.parameters for p in projections(model, method)) - lengths if method.pissa else 0
    return 4 * lengths + matrices * width


def step(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> Tape:
    """The simulated step: what it allocates beyond weights, adapter and optimizer."""
    return run_step(model, method, run, ranks(model, method))


def weight_bytes(model: Architecture, name: str) -> int:
    """Bytes of the base in precision `name`, with the parts that stay at 16 bit and position tables."""
    kind = precision(name)
    return kind.weights(model.quantizable, model.total) + model.fixed_positions * kind.compute


def trained_split(model: Architecture, method: FinetuningMethod) -> tuple[int, int]:
    """Trainable parameters as (added to the base and stored in the adapter, of the base itself)."""
    parts = trained_parts(model, method)
    added = sum(count for part, count in parts.items() if part in ("matrices", "new rows", "prefix", "prompt"))
    return added, sum(parts.values()) - added


def inference(model: Architecture, method: FinetuningMethod | None, run: TrainingConfig) -> dict[str, int]:
    """Bytes of weights, adapter and KV cache while `batch` sequences are generated.

    Without a method the adapter is merged into the weights.
    """
    adapter = trained_split(model, method)[0] * run.width if method else 0
    parts = {
        "weights": weight_bytes(model, run.precision),
        "adapter": adapter,
        "kv_cache": model.kv_bytes(run.batch, run.sequence, run.width),
        "overhead": run.context,
    }
    return {**parts, "total": sum(parts.values())}


def possible(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> bool:
    """Whether this model can be trained with these settings."""
    try:
        refuse_impossible(model, method, run)
    except UserError:
        return False
    return True


def refuse_impossible(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> None:
    """Raises UserError if this model cannot be trained with these settings."""
    _, base = trained_split(model, method)  # raises for targets and blocks that the model does not have
    if precision(run.precision).quantized and base and method.kind != "lora":  # embeddings and head are not quantized
        raise UserError(
            f"{run.precision} weights cannot be trained: {method.kind} changes the base itself. "
            "Use --method lora, or a 16- or 32-bit precision."
        )
    if method.kind == "freeze" and not (method.last_blocks or method.train_embeddings):
        raise UserError("freeze leaves nothing to train. Raise last-blocks, or train the embeddings.")
    tokens = (run.span or run.sequence) + (method.virtual_tokens if method.kind == "prompt" else 0)
    if (model.positions or model.fixed_positions) and tokens > model.context:
        raise UserError(f"sequence must be at most {model.context:,}, the model's positions, got {tokens:,}.")
