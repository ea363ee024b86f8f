"""Each number of the memory table as a formula with its values."""

from collections.abc import Iterator

from pipeline.calc.architecture import Architecture
from pipeline.calc.memory import Memory, trained_split
from pipeline.calc.parameters import Projection, projections
from pipeline.calc.precision import precision
from pipeline.calc.settings import FinetuningMethod, TrainingConfig

GIB = 2**30


def explain(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, memory: Memory
) -> Iterator[tuple[str, str]]:
    """(quantity, formula) pairs, in the order of the screen."""
    yield "parameters", " + ".join(f"{name} {count:,}" for name, count in model.components().items())
    for p in projections(model, method):
        yield p.name, _format_pair(p, method)
    adapter, base = trained_split(model, method)
    yield "trainable", f"{adapter:,} added + {base:,} of the base = {adapter + base:,}"
    yield "weights", _format_weights(model, run) + _format_result(memory.weights)
    adapter_width = precision(run.adapter_precision).compute
    yield "adapter", f"{adapter:,} × {adapter_width} B ({run.adapter_precision})" + _format_result(memory.adapter)
    yield (
        "gradients",
        f"alive at the peak, of {adapter:,} × {adapter_width} B + {base:,} × {run.width} B"
        + _format_result(memory.gradients),
    )
    yield (
        "optimizer",
        f"{run.optimizer}: {_format_optimizer(memory, adapter * adapter_width + base * run.width)}"
        + _format_result(memory.optimizer),
    )
    yield "activations", _format_activations(model, run) + _format_result(memory.activations)
    yield "logits", _format_logits(model, run) + _format_result(memory.logits)
    yield "overhead", "CUDA context and kernels, assumed" + _format_result(memory.overhead)
    yield "peak", f"the sum, in phase “{memory.where}”" + _format_result(memory.peak)


def _format_pair(p: Projection, method: FinetuningMethod) -> str:
    each = f"A {p.rank} × {p.inputs:,} + B {p.outputs:,} × {p.rank}"
    each += f" + magnitude {p.outputs:,}" if method.dora else ""
    each = f"{p.experts} × ({each})" if p.experts > 1 else each
    return f"{each} = {p.parameters_each:,}; × {p.count} = {p.parameters:,}"


def _format_weights(model: Architecture, run: TrainingConfig) -> str:
    kind = precision(run.precision)
    if not kind.quantized:
        table = f" + {model.fixed_positions:,} × {kind.compute} B (table of positions)" if model.fixed_positions else ""
        return f"{model.total:,} × {kind.bytes:g} B ({run.precision}){table}"
    return (
        f"{model.quantizable:,} × {kind.bytes:.4g} B ({run.precision}: {kind.bits:g} bit"
        f"{f' + {8 * kind.scales:.3g} for scales' if kind.scales else ''}) + {model.total - model.quantizable:,} × "
        f"{kind.rest} B (embeddings, head, norms, biases)"
    )


def _format_optimizer(memory: Memory, trained: int) -> str:
    return (
        f"{memory.optimizer / trained:.3g} bytes of state a trained byte, of {trained:,} B"
        if trained
        else "nothing trains"
    )


def _format_activations(model: Architecture, run: TrainingConfig) -> str:
    size = run.tokens * model.hidden * run.width
    count = sum(run.checkpointed(index) for index in range(len(model.blocks)))
    each = f"{run.batch} × {run.sequence:,} × {model.hidden:,} × {run.width} B = {size / 2**20:,.1f} MiB"
    blocks = len(model.blocks)
    if count == blocks:
        total = blocks * size / GIB
        return f"{blocks} blocks keep their input, {each} each ({total:.2f} GiB); and what the peak's phase works with"
    if count:
        return f"{count} of {blocks} blocks keep their input, {each} each; the others every tensor that backward needs"
    return f"{blocks} blocks keep every tensor that backward needs, counted operation by operation, in units of {each}"


def _format_logits(model: Architecture, run: TrainingConfig) -> str:
    rows = min(run.chunk, run.labels) if run.loss == "chunked" else run.labels
    size = rows * model.vocabulary
    return (
        f"{rows:,} labels × {model.vocabulary:,} words × ({run.width} B logits + 4 B in fp32, 4 B log-softmax and "
        f"4 B gradient, as many as are alive in the peak's phase; {size * 4 / GIB:.2f} GiB for each 4 B)"
    )


def _format_result(size: int) -> str:
    return f" = {size:,} B = {size / GIB:.2f} GiB"
