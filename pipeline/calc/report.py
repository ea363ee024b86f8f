"""The calculator's results as plain data, and their formatting."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import GIB, LARGEST, gpus
from pipeline.calc.memory import PARTS, Memory, inference, possible, predict
from pipeline.calc.method import (
    FinetuningMethod,
    Projection,
    find_method,
    first_adapter,
    projections,
    ranks,
    trained_split,
    why_they_differ,
    with_options,
)
from pipeline.calc.settings import QLORA, TrainingConfig, precision
from pipeline.errors import UserError

SWEEPS = (
    "rank",
    "sequence",
    "batch",
    "tokens_per_batch",
    "precision",
    "optimizer",
    "checkpointing",
    "loss",
    "method",
    "targets",
)
MIB = 2**20
SHADES = dict(
    zip(PARTS, ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_black"), strict=True)
)
CHECKPOINTING = {"full": True, "none": False, "selective": "selective"}  # as JSON has it
PROJECTION = ("projection", "in → out", "A", "B", "count", "parameters")


def answer(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> dict[str, Any]:
    """All results for one configuration, sizes in bytes. Raises UserError for invalid settings."""
    memory = predict(model, method, run)
    added, base = trained_split(model, method)
    parts = method.trained_parts(model)
    trained = (*parts.added.items(), *parts.base.items())
    return {
        "model": model.name,
        "method": method.name,
        "rank": getattr(method, "rank", None),
        "alpha": getattr(method, "effective_alpha", None),
        "scale": getattr(method, "scale", None),
        # last names of the adapted linears, in the model's order
        "targets": list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in ranks(model, method))),
        "parameters": {
            "total": model.total,
            "trainable": added + base,
            "trainable_percent": round(100 * (added + base) / model.total, 4),
            "document": method.simple_count(model),
            "components": model.components(),
            "trained": {name: count for name, count in trained if count},
        },
        "projections": [
            {
                "name": p.name,
                "in": p.inputs,
                "out": p.outputs,
                "count": p.count,
                "rank": p.rank,
                "experts": p.experts,
                "A": [p.rank, p.inputs],
                "B": [p.outputs, p.rank],
                "parameters_each": p.parameters_each,
            }
            for p in projections(model, method)
        ],
        "adapter_bytes": {"fp16": 2 * added, "fp32": 4 * added},
        "memory": {**memory.parts(), "peak": memory.peak, "peak_at": memory.where},
        "inference": inference(model, method, run),
        "fits": [gpu.name for gpu in gpus().values() if memory.peak <= gpu.bytes],
        "assumptions": {**asdict(run), "checkpointing": CHECKPOINTING[run.checkpointing]},
        "notes": notes_on(model, method),
        "source": model.source,
    }


def notes_on(model: Architecture, method: FinetuningMethod) -> list[str]:
    """Remarks for the reader of the counts."""
    notes = [*model.notes, *method.notes(model), why_they_differ(model, method)]
    return [note for note in notes if note]


Column = tuple[FinetuningMethod, TrainingConfig, Memory]


def side_by_side(
    model: Architecture,
    method: FinetuningMethod,
    run: TrainingConfig,
    methods: Mapping[str, FinetuningMethod],
) -> dict[str, Column]:
    """The same step with each method that trains the base, with the adapter, and with it on NF4."""
    adapter = method if method.adapter else first_adapter(methods)
    plain = replace(run, precision="bf16") if precision(run.precision).quantized else run
    columns = {name: (m.fitted(model), plain) for name, m in methods.items() if not m.adapter}
    heading, quantized = adapter.columns
    columns[heading or adapter.name] = (adapter, run)
    if not model.style.ours:
        columns[quantized or f"{adapter.name} NF4"] = (adapter, replace(run, precision=QLORA))
    # leave out those that this model cannot run
    return {
        name: (m, r, predict(model, m, r))
        for name, (m, r) in columns.items()
        if possible(model, m, r)
    }


def swept(
    method: FinetuningMethod,
    run: TrainingConfig,
    key: str,
    values: list[str],
    methods: Mapping[str, FinetuningMethod],
) -> list[tuple[str, FinetuningMethod, TrainingConfig]]:
    """The configuration for each value of `key`. Raises UserError."""
    if key not in SWEEPS:
        raise UserError(f"--sweep takes one of {', '.join(SWEEPS)}, got {key!r}.")
    rows = []
    for text in values:
        if key in LARGEST and not re.fullmatch(r"-?[0-9]{1,12}", text):
            raise UserError(f"--sweep {key} takes whole numbers, got {text[:40]!r}.")
        value: Any = int(text) if key in LARGEST else text
        m, r = method, run
        if key == "method":
            m, implied = find_method(methods, value)
            step = {} if m.name == method.name else m.step
            r = replace(run, **{**step, **implied, "answers": m.answers})
        elif key in TrainingConfig.__dataclass_fields__:
            r = replace(run, **{key: value})
        else:
            m = with_options({**methods, method.name: method}, **{key: value})[method.name]
        rows.append((text, m, r))
    return rows


def cells_of(projection: Projection) -> tuple[str, ...]:
    """A row of the table of projections, with the columns of PROJECTION."""
    p = projection
    return (
        p.name,
        f"{p.inputs:,} → {p.outputs:,}",
        f"{p.rank} × {p.inputs:,}",
        f"{p.outputs:,} × {p.rank}",
        f"{p.count} × {p.experts} experts" if p.experts > 1 else f"{p.count}",
        f"{p.parameters:,}",
    )


def gib(size: float) -> str:
    """A size in GiB with two decimals, or in MiB or KiB if it is smaller, for tiny models."""
    if size == 0:
        return "0"
    if size < 0.01 * GIB:
        return f"{size / MIB:.2f} MiB" if size >= 0.1 * MIB else f"{size / 1024:.1f} KiB"
    return f"{size / GIB:.2f}"


def smallest(size: int) -> str:
    """The label of the smallest NVIDIA device with at least `size` bytes."""
    cards = (gpu for name, gpu in gpus().items() if not name.startswith("mac-"))
    return next((gpu.label for gpu in cards if gpu.bytes >= size), "none of these")


def capped(value: int | str, limit: int | None) -> str:
    """A result of `largest`; “or more” if the search stopped at its `limit`."""
    if isinstance(value, str):
        return value
    return f"{value:,}" + " or more" * (value == limit)


def explain(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, memory: Memory
) -> Iterator[tuple[str, str]]:
    """Each number of the memory table as (quantity, formula with its values)."""

    def result(size: int) -> str:
        return f" = {size:,} B = {size / GIB:.2f} GiB"

    yield (
        "parameters",
        " + ".join(f"{name} {count:,}" for name, count in model.components().items()),
    )
    for p in projections(model, method):
        factors = f"A {p.rank} × {p.inputs:,} + B {p.outputs:,} × {p.rank}"
        factors += f" + magnitude {p.magnitudes:,}" if p.magnitudes else ""
        factors = f"{p.experts} × ({factors})" if p.experts > 1 else factors
        yield p.name, f"{factors} = {p.parameters_each:,}; × {p.count} = {p.parameters:,}"
    added, base = trained_split(model, method)
    yield "trainable", f"{added:,} added + {base:,} of the base = {added + base:,}"

    kind = precision(run.precision)
    if kind.quantized:
        scales = f" + {8 * kind.scales:.3g} for scales" if kind.scales else ""
        weights = (
            f"{model.quantizable:,} × {kind.bytes:.4g} B ({run.precision}: {kind.bits:g} "
            f"bit{scales})"
        )
        rest = (
            f" + {model.total - model.quantizable:,} × {kind.compute} B (embeddings, head, norms, "
            "biases)"
        )
    else:
        weights = f"{model.total:,} × {kind.bytes:g} B ({run.precision})"
        table = f" + {model.fixed_positions:,} × {kind.compute} B (table of positions)"
        rest = table if model.fixed_positions else ""
    yield "weights", weights + rest + result(memory.weights)
    width = precision(run.adapter_precision).compute
    yield "adapter", f"{added:,} × {width} B ({run.adapter_precision})" + result(memory.adapter)
    alive = f"alive at the peak, of {added:,} × {width} B + {base:,} × {run.width} B"
    yield "gradients", alive + result(memory.gradients)
    trained = added * width + base * run.width
    state = (
        f"{memory.optimizer / trained:.3g} bytes of state a trained byte, of {trained:,} B"
        if trained
        else ""
    )
    yield "optimizer", f"{run.optimizer}: {state or 'nothing trains'}" + result(memory.optimizer)

    size, blocks = run.tokens * model.hidden * run.width, len(model.blocks)
    inputs = sum(run.checkpointed(index) for index in range(blocks))
    unit = f"{run.rows} × {run.length:,} × {model.hidden:,} × {run.width} B = {size / MIB:,.1f} MiB"
    if inputs == blocks:
        total = f"{blocks * size / GIB:.2f} GiB"
        saved = (
            f"{blocks} blocks keep their input, {unit} each ({total}); and what the peak's phase "
            "works with"
        )
    elif inputs:
        every = "the others every tensor that backward needs"
        saved = f"{inputs} of {blocks} blocks keep their input, {unit} each; {every}"
    else:
        every = "every tensor that backward needs, counted operation by operation"
        saved = f"{blocks} blocks keep {every}, in units of {unit}"
    yield "activations", saved + result(memory.activations)

    rows = min(run.chunk, run.labels) if run.loss == "chunked" else run.labels
    alive = (
        f"as many as are alive in the peak's phase; {rows * model.vocabulary * 4 / GIB:.2f} GiB "
        "for each 4 B"
    )
    bytes_each = f"({run.width} B logits + 4 B in fp32, 4 B log-softmax and 4 B gradient, {alive})"
    yield (
        "logits",
        f"{rows:,} labels × {model.vocabulary:,} words × {bytes_each}" + result(memory.logits),
    )
    yield "overhead", "CUDA context and kernels, assumed" + result(memory.overhead)
    yield "peak", f"the sum, in phase “{memory.where}”" + result(memory.peak)
