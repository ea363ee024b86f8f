"""The calculator's results as plain data, and their formatting for the command line and the terminal app."""

import re
from dataclasses import asdict, replace
from typing import Any

from pipeline.calc.architecture import Architecture
from pipeline.calc.fit import GIB, LARGEST, gpus
from pipeline.calc.memory import PARTS, Memory, inference, possible, predict, trained_split
from pipeline.calc.parameters import (
    Projection,
    document_count,
    notes,
    projections,
    ranks,
    trained_parts,
    why_they_differ,
)
from pipeline.calc.precision import precision
from pipeline.calc.settings import FinetuningMethod, TrainingConfig, qlora
from pipeline.errors import UserError

SWEEPS = ("rank", "sequence", "batch", "precision", "optimizer", "checkpointing", "loss", "method", "targets")
MIB = 2**20
SHADES = dict(zip(PARTS, ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_black"), strict=True))
PROJECTION = ("projection", "in → out", "A", "B", "count", "parameters")


def answer(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> dict[str, Any]:
    """All results for one configuration, sizes in bytes. Raises UserError for invalid settings."""
    memory = predict(model, method, run)
    added, base = trained_split(model, method)
    lora = method.kind == "lora"
    return {
        "model": model.name,
        "method": method.kind,
        "rank": method.rank if lora else None,
        "alpha": method.alpha if lora else None,
        "scale": method.scale if lora else None,
        "targets": target_names(model, method),
        "parameters": {
            "total": model.total,
            "trainable": added + base,
            "trainable_percent": round(100 * (added + base) / model.total, 4),
            "document": document_count(model, method),
            "components": model.components(),
            "trained": trained_parts(model, method),
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
        "assumptions": assumptions(run),
        "notes": [*model.notes, *notes(model, method), *filter(None, [why_they_differ(model, method)])],
        "source": model.source,
    }


def assumptions(run: TrainingConfig) -> dict[str, Any]:
    """The settings of the step; `checkpointing` is true, false or "selective"."""
    values = asdict(run)
    values["checkpointing"] = {"full": True, "none": False}.get(run.checkpointing, run.checkpointing)
    return values


def target_names(model: Architecture, method: FinetuningMethod) -> list[str]:
    """Last names of the linears that get LoRA, in the model's order."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in ranks(model, method)))


def side_by_side(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig
) -> dict[str, tuple[FinetuningMethod, TrainingConfig, Memory]]:
    """The same step as full fine-tuning, freezing, the adapter at the run's precision, and the adapter on NF4."""
    adapter = method if method.kind not in ("full", "freeze") else replace(method, kind="lora")
    plain = replace(run, precision="bf16") if precision(run.precision).quantized else run
    freeze = replace(method, kind="freeze", last_blocks=min(method.last_blocks, len(model.blocks)))
    columns = {"full": (replace(method, kind="full"), plain), "freeze": (freeze, plain)}
    lora = adapter.kind == "lora"
    columns["LoRA" if lora else adapter.kind] = (adapter, run)
    if not model.style.ours:
        columns["QLoRA" if lora else f"{adapter.kind} NF4"] = (adapter, qlora(run))
    # leave out those that this model cannot run
    return {name: (m, r, predict(model, m, r)) for name, (m, r) in columns.items() if possible(model, m, r)}


def swept(
    method: FinetuningMethod, run: TrainingConfig, key: str, values: list[str]
) -> list[tuple[str, FinetuningMethod, TrainingConfig]]:
    """The configuration for each value of `key`. Raises UserError for an unknown key or an invalid value."""
    if key not in SWEEPS:
        raise UserError(f"--sweep takes one of {', '.join(SWEEPS)}, got {key!r}.")
    return [(value, *_replace_setting(method, run, key, value)) for value in values]


def _replace_setting(
    method: FinetuningMethod, run: TrainingConfig, key: str, value: str
) -> tuple[FinetuningMethod, TrainingConfig]:
    new_value: Any = value
    if key in LARGEST:
        if not re.fullmatch(r"-?[0-9]{1,12}", value):
            raise UserError(f"--sweep {key} takes whole numbers, got {value[:40]!r}.")
        new_value = int(value)
    if key == "rank":
        return replace(method, rank=new_value, alpha=method.alpha * new_value / method.rank), run
    if key == "targets":
        return replace(method, targets=(value,)), run
    if key == "method":
        return (replace(method, kind="lora"), qlora(run)) if value == "qlora" else (replace(method, kind=value), run)
    return method, replace(run, **{key: new_value})


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


def title_of(method: FinetuningMethod) -> str:
    """The method in words."""
    if method.kind == "lora":
        name = "DoRA" if method.dora else "rsLoRA" if method.rslora else "LoRA"
        ends = {"none": "", "all": ", embeddings and head", "new_rows": f", {method.new_rows} new rows"}
        return f"{name} r={method.rank} on {', '.join(method.targets)}{ends[method.embeddings]}"
    if method.kind == "freeze":
        blocks = f"freeze, last {method.last_blocks} blocks"
        return f"{blocks}, embeddings and head" if method.train_embeddings else blocks
    if method.kind in ("prefix", "prompt"):
        return f"{method.kind} tuning, {method.virtual_tokens} virtual tokens"
    return "full fine-tuning"


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
    return f"{value:,} or more" if value == limit else f"{value:,}" if isinstance(value, int) else value
