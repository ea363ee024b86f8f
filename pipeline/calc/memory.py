"""Memory of a training step, by part at its peak, and of inference."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from pipeline.calc.architecture import Architecture
from pipeline.calc.method import FinetuningMethod, trained_split
from pipeline.calc.settings import (
    STATE_BLOCK,
    STATE_CHUNK,
    STATE_CHUNK_ON_CARD,
    TrainingConfig,
    precision,
)
from pipeline.calc.step import run_step
from pipeline.errors import UserError


class Memory(NamedTuple):
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


PARTS = tuple(part for part in Memory._fields if part != "where")


def predict(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> Memory:
    """Memory of one training step. Raises UserError for invalid settings."""
    method.check()
    run.check()
    refuse_impossible(model, method, run)
    tape = run_step(model, method, run)
    flat = model.style.ours or run.ours  # gradients are one persistent flat buffer
    added, base = trained_split(model, method)
    width = precision(run.adapter_precision).compute
    fp32 = method.fp32_parameters(model)
    # our trainer keeps magnitudes in fp32 in a vector of their own; PEFT gives them the adapter's
    # precision
    # (parameters, bytes each)
    groups = [(added - fp32, width), (fp32, 4 if flat else width), (base, run.width)]
    trained = sum(count * size for count, size in groups)
    matrices = method.matrices(model) if run.optimizer == "muon" else []
    # muon has one of AdamW's two moments of a matrix
    spared = sum(map(prod, matrices)) * run.moment_bytes(width if method.adapter else run.width)
    code, scratch = _update_bytes(run, added + base, trained, matrices)
    copies = run.width * method.factor_parameters(model) if run.keeps_copies else 0
    # the tape's peak is the step's: weights, optimizer and a flat gradient are there from its first
    # phase to its last
    memory = Memory(
        weights=weight_bytes(model, run.precision),
        adapter=trained
        - base * run.width
        + (method.buffer_bytes(model, width) if flat else 0)
        + copies,
        gradients=tape.at_peak.get("gradients", 0) + (trained if flat else 0),
        optimizer=round(
            sum(count * run.state_bytes(size) for count, size in groups) + code - spared
        ),
        activations=tape.at_peak.get("activations", 0),
        logits=tape.at_peak.get("logits", 0),
        overhead=run.context,
        where=tape.peak_phase,
    )
    # the update has the gradients, and no activations any more
    if scratch and scratch + (0 if flat else trained) > tape.peak:
        return memory._replace(
            gradients=trained,
            optimizer=memory.optimizer + scratch,
            activations=0,
            logits=0,
            where="optimizer's update",
        )
    return memory


# bytes of the tables that encode and decode the moments of adamw-8bit, ours
CODE = 2 * (2 * 256 * 4 + 2**16)


def _update_bytes(
    run: TrainingConfig, count: int, trained: int, matrices: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The optimizer's bytes beside its state: always, and while it updates `count` parameters.

    `trained`: bytes of those parameters. `matrices`: shapes of those that muon updates.
    """
    if not run.ours:
        # a copy of all
        return 0, trained if (run.trainer, run.optimizer) == ("torch-foreach", "adamw") else 0
    if matrices:  # in bf16: two of a matrix, and two of the products of its shorter sides
        return 0, max(4 * prod(shape) + 4 * min(shape) ** 2 for shape in matrices)
    if "8bit" not in run.optimizer:
        return 0, 0
    most = STATE_CHUNK if run.cpu else STATE_CHUNK_ON_CARD
    chunk = min(most, -(-count // STATE_BLOCK) * STATE_BLOCK)
    # a paged state comes from the host
    state = 2 * (1 + 4 / STATE_BLOCK) * chunk if run.optimizer.startswith("paged") else 0
    # both moments in fp32, codes and edges in 4 bytes, and a bool
    return CODE, 17 * chunk + round(state)


def weight_bytes(model: Architecture, name: str) -> int:
    """Bytes of the base in precision `name`, with its 16-bit parts and position tables."""
    kind = precision(name)
    return kind.weights(model.quantizable, model.total) + model.fixed_positions * kind.compute


def inference(
    model: Architecture, method: FinetuningMethod | None, run: TrainingConfig
) -> dict[str, int]:
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
    trained_split(model, method)  # raises for targets and blocks that the model does not have
    method.refuse(model)
    if precision(run.precision).quantized and not method.adapter:
        raise UserError(
            f"{run.precision} weights cannot be trained: {method.name} changes the base itself. "
            "Use --method lora, or a 16- or 32-bit precision."
        )
    virtual = method.positions
    room = model.context - virtual
    # a packed row is longer than its sequences, whose positions start anew
    if (model.positions or model.fixed_positions) and run.attended > room:
        if room < 1:
            raise UserError(
                f"virtual-tokens must be below {model.context:,}, the model's positions, got "
                f"{virtual:,}."
            )
        less = f" less {virtual:,} virtual tokens" if virtual else ""
        raise UserError(
            f"sequence must be at most {room:,}, the model's positions{less}, got {run.attended:,}."
        )
