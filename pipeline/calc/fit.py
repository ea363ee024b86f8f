"""What fits: GPUs and their memory, the largest setting that a memory holds, and what to change first."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pipeline.calc.architecture import Architecture
from pipeline.calc.memory import possible, predict
from pipeline.calc.precision import precision
from pipeline.calc.settings import FinetuningMethod, TrainingConfig, qlora
from pipeline.calc.sources.open_model import nearest
from pipeline.errors import UserError

GIB = 2**30
LARGEST = {"batch": 4096, "sequence": 2**20, "rank": 4096}
LIGHTER = ("fp32", "bf16", "int8", "nf4-dq")  # tried in this order: the first that fits loses the least


@dataclass(frozen=True)
class Gpu:
    """A device; `bytes` are those that a process can have, context included."""

    name: str
    label: str
    bytes: int


@cache
def gpus() -> dict[str, Gpu]:
    """Common devices by name, smallest first: NVIDIA's as nvidia-smi totals them, Apple's as Metal lets one use."""
    table = json.loads((Path(__file__).parent / "presets/gpus.json").read_text(encoding="utf-8"))
    found = [Gpu(name, row["label"], round(row["mib"] * 2**20 * row.get("usable", 1))) for name, row in table.items()]
    return {gpu.name: gpu for gpu in sorted(found, key=lambda gpu: gpu.bytes)}


def gpu(name: str) -> Gpu:
    """Raises UserError with the nearest names."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key in gpus():
        return gpus()[key]
    near = nearest(key, gpus())
    raise UserError(f"gpu {name!r} is not known. {'Nearest' if near else 'Known'}: {', '.join(near or gpus())}.")


def of_size(gib: float) -> Gpu:
    """A device with so many GiB. Raises UserError where that is no amount of memory."""
    if not 0 < gib < 2**20:
        raise UserError(f"fit takes GiB of memory, more than 0, got {gib:g}.")
    return Gpu("fit", f"{gib:g} GiB", round(gib * GIB))


@dataclass(frozen=True)
class Largest:
    """The most that fits of each setting, all others as given; 0 where not even the least does."""

    batch: int
    sequence: int
    rank: int | None  # None where the method has no rank
    precision: str | None


def largest(model: Architecture, method: FinetuningMethod, run: TrainingConfig, budget: int) -> Largest:
    """The largest batch, sequence and rank, and the least quantized precision, that need at most `budget` bytes."""
    context = min(LARGEST["sequence"], model.context)
    return Largest(
        batch=_most(lambda n: _fits(model, method, replace(run, batch=n), budget), LARGEST["batch"]),
        sequence=_most(lambda n: _fits(model, method, replace(run, sequence=n), budget), context),
        rank=_most(lambda n: _fits(model, replace(method, rank=n, rank_pattern=()), run, budget), LARGEST["rank"])
        if method.kind == "lora"
        else None,
        precision=next((p for p in LIGHTER if _fits(model, method, replace(run, precision=p), budget)), None),
    )


def _fits(model: Architecture, method: FinetuningMethod, run: TrainingConfig, budget: int) -> bool:
    return possible(model, method, run) and predict(model, method, run).peak <= budget


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` that fits: doubling, then halving the gap (more never needs less)."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def changes(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, budget: int
) -> Iterator[tuple[str, FinetuningMethod, TrainingConfig, int]]:
    """What to change, one at a time and then one on top of the other, until it fits: (words, settings, peak).

    First each change alone, cheapest in quality and time first, and only those that fit; then, if none does, all that
    help in that order, each added to those before.
    """
    for words, change in _CHANGES:
        m, r = change(method, run)
        if (m, r) != (method, run) and _fits(model, m, r, budget):
            yield words, m, r, predict(model, m, r).peak
            return
    m, r, said, best = method, run, list[str](), predict(model, method, run).peak
    for words, change in _CHANGES:
        changed = change(m, r)
        if changed == (m, r) or not possible(model, *changed):
            continue
        peak = predict(model, *changed).peak
        if peak < best:
            (m, r), best = changed, peak
            said.append(words)
            yield "; ".join(said), m, r, peak
        if best <= budget:
            return


Change = Callable[[FinetuningMethod, TrainingConfig], tuple[FinetuningMethod, TrainingConfig]]


def _adapters_only(method: FinetuningMethod, run: TrainingConfig) -> tuple[FinetuningMethod, TrainingConfig]:
    return (method, run) if method.kind in ("lora", "prefix", "prompt") else (replace(method, kind="lora"), run)


_CHANGES: tuple[tuple[str, Change], ...] = (
    ("--loss chunked", lambda m, r: (m, replace(r, loss="chunked"))),
    ("--checkpointing full", lambda m, r: (m, replace(r, checkpointing="full"))),
    ("--attention sdpa", lambda m, r: (m, replace(r, attention="sdpa"))),
    ("--batch 1 and accumulate gradients", lambda m, r: (m, replace(r, batch=1))),
    ("--method lora", _adapters_only),
    (
        "--precision nf4-dq (QLoRA)",
        lambda m, r: (
            m if m.embeddings != "all" else replace(m, embeddings="none"),
            r if precision(r.precision).bits <= 4 else qlora(r),
        ),
    ),
    ("--sequence 512", lambda m, r: (m, replace(r, sequence=min(512, r.sequence)))),
)
