"""Time and cost of a run: FLOPs of a token, a GPU's peak, the share that training reaches.

Sources of UTILIZATION, the share of the dense peak by all FLOPs, recomputed ones included: LoRA in
PEFT's MetaMathQA results reaches 26% of an L40S with short padded sequences, in fms-acceleration's
benchmarks 45–64% of an A100; llm-foundry's table of pretraining has 34–59% of an H100, up to 75% of
an A100. Tests compare with published rates.
"""

import re
from collections.abc import Iterator, Sequence
from operator import add
from typing import Any, NamedTuple

from pipeline.calc.architecture import Architecture, Block, Linear
from pipeline.calc.fit import Gpu, gpus
from pipeline.calc.memory import predict
from pipeline.calc.method import FinetuningMethod, ranks, trained_split
from pipeline.calc.settings import TrainingConfig, precision
from pipeline.calc.step.attention import CHUNK
from pipeline.errors import UserError
from pipeline.files.text import abbreviate_repr

UTILIZATION = (0.25, 0.65)
MOST_TOKENS = 10**18
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class Range(NamedTuple):
    """Hours on one GPU from `low` to `high`, the FLOPs of all tokens, and what was assumed."""

    low: float
    high: float
    flops: float
    assumptions: tuple[str, ...]


class Flops(NamedTuple):
    """FLOPs per token; `attention`: the share of scores and their products in all three."""

    forward: float = 0
    recomputed: float = 0
    backward: float = 0
    attention: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.recomputed + self.backward

    def plus(self, other: "Flops") -> "Flops":
        return Flops(*map(add, self, other))


def parse_tokens(text: str) -> int:
    """A number of tokens such as 5M, 200k, 1.2B or 5_000_000. Raises UserError."""
    match = re.fullmatch(r"([0-9][0-9_,]{0,25}(?:\.[0-9]{1,12})?)\s?([kKmMbBtT]?)", text.strip())
    count = round(float(re.sub("[_,]", "", match[1])) * _UNITS[match[2].lower()]) if match else 0
    if not 1 <= count <= MOST_TOKENS:
        shown = abbreviate_repr(text)
        raise UserError(
            f"tokens must be a number from 1 to 10^18, such as 200k, 5M or 1.2B, got {shown}."
        )
    return count


def training_time(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, tokens: int, device: Gpu
) -> Range:
    """Hours to train on `tokens`, all epochs. Raises UserError without a known peak.

    seconds per token = (FLOPs / peak + bytes of dequantized weights / bandwidth) / utilization
    """
    if device.tflops is None or device.gbps is None:
        known = ", ".join(name for name, gpu in gpus().items() if gpu.tflops)
        raise UserError(
            f"--tokens needs a GPU whose 16-bit peak is published, got {device.label}. Choose "
            f"{known}."
        )
    if run.precision == "fp32":
        raise UserError(
            "--tokens needs 16-bit or TF32 products, got --precision fp32. Use --precision bf16 "
            "or tf32."
        )
    halved = run.width == 4  # TF32 tensor cores have half the 16-bit rate
    peak = device.tflops * 1e12 / (1 + halved)
    flops = flops_per_token(model, method, run)
    moved = dequantized_bytes(model, method, run) / run.tokens / (device.gbps * 1e9)
    low, high = (
        tokens * (flops.total / peak + moved) / share / 3600 for share in reversed(UTILIZATION)
    )
    no_bf16 = (
        "; it has no bf16: train in fp16" if run.precision == "bf16" and not device.bf16 else ""
    )
    assumptions = [
        f"{device.label}: {peak / 1e12:g} TFLOP/s, dense, in "
        f"{'TF32' if halved else '16 bit'}{no_bf16}"
    ]
    if moved:
        ms = 1000 * moved * run.tokens
        assumptions += [
            f"{run.precision}: dequantizing takes {ms:,.3g} ms per step, at {device.gbps:,} GB/s"
        ]
    return Range(low, high, tokens * flops.total, (*_assumptions(flops, method, run), *assumptions))


def _assumptions(flops: Flops, method: FinetuningMethod, run: TrainingConfig) -> Iterator[str]:
    """What holds for every device."""
    parts = [f"{flops.forward / 1e9:,.3g} forward"]
    parts += [f"{flops.recomputed / 1e9:,.3g} recomputed"] if flops.recomputed else []
    frozen = " without gradients of frozen weights" if method.adapter else ""
    yield (
        f"{flops.total / 1e9:,.3g} GFLOPs per token: {', '.join(parts)}, "
        f"{flops.backward / 1e9:,.3g} backward{frozen}"
    )
    length = run.attended + method.positions
    yield (
        f"{100 * flops.attention / flops.total:.2g}% of them are attention scores, over "
        f"{length:,} tokens"
    )
    low, high = (f"{100 * share:.0f}" for share in UTILIZATION)
    yield (
        f"{low}–{high}% of the peak is reached; steps that are too small to fill a GPU take longer"
    )
    yield "one GPU; loading, evaluation, checkpoints and the optimizer's update are not counted"


def estimate(
    model: Architecture,
    method: FinetuningMethod,
    run: TrainingConfig,
    tokens: int,
    devices: Sequence[Gpu],
    price: float | None,
) -> dict[str, Any]:
    """Hours on each device, and dollars at `price` per GPU-hour. Raises UserError."""
    if price is not None and not 0 < price < 1e6:
        raise UserError(
            "price must be dollars per GPU-hour, more than 0 and less than a million, got "
            f"{price:g}."
        )
    times = {device: training_time(model, method, run, tokens, device) for device in devices}
    peak = predict(model, method, run).peak
    kept = [set(time.assumptions) for time in times.values()]
    first = next(iter(times.values()))
    return {
        "tokens": tokens,
        "price": price,
        "flops": first.flops,
        "utilization": UTILIZATION,
        "gpus": [
            {
                "gpu": device.name,
                "hours": (time.low, time.high),
                "cost": None if price is None else (time.low * price, time.high * price),
                "fits": peak <= device.bytes,
            }
            for device, time in times.items()
        ],
        "assumptions": [  # those that hold for every device
            line for line in first.assumptions if line in set.intersection(*kept)
        ],
    }


# A product has 2 FLOPs per weight and token forward, 2 for its input's gradient, 2 for its own
# (Kaplan et al. 2020, section 2)


def flops_per_token(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> Flops:
    """FLOPs of one token in one step, from the shapes of the products alone."""
    base, rank_by_name = method.trained_base(model), ranks(model, method)
    first = first_trained(model, method)
    length = run.attended + method.positions
    total = Flops()
    kinds = dict[tuple[int, tuple[int, ...], bool, bool, bool], Flops]()
    for index, block in enumerate(model.blocks):
        adapted = model.ranks_in(index, rank_by_name)
        differs = index >= first
        trains, again = index >= base.first_block, run.checkpointed(index)
        key = (id(block), adapted, differs, trains, again)
        if key not in kinds:  # most blocks are equal
            kinds[key] = _block(model, method, run, block, adapted, length, differs, trains, again)
        total = total.plus(kinds[key])
    # virtual tokens pass through the blocks too
    more = 1 + method.positions * run.virtual_places / run.tokens
    total = Flops(*(part * more for part in total))
    for linear in model.outside:
        once = 2.0 * linear.weights
        total = total.plus(Flops(once, 0, once + (once if base.rest else 0)))
    head = model.head_linear
    once = 2.0 * head.weights * run.labels / run.tokens
    rank = rank_by_name.get(head.name, 0)
    added = 2.0 * method.linear_parameters(head, rank) if rank else 0
    return total.plus(Flops(once + added, 0, once * (2 if base.ends else 1) + 2 * added))


def first_trained(model: Architecture, method: FinetuningMethod) -> int:
    """The first block that a gradient must reach; 0 if embeddings or virtual tokens train."""
    base, rank_by_name = method.trained_base(model), ranks(model, method)
    adapted = [
        (linear, rank_by_name[name]) for name, linear in model.linears() if name in rank_by_name
    ]
    in_linears = sum(method.linear_parameters(linear, rank) for linear, rank in adapted)
    if base.ends or trained_split(model, method)[0] > in_linears:
        return 0
    for index in range(base.first_block):
        if any(model.ranks_in(index, rank_by_name)):
            return index
    return base.first_block


def _block(
    model: Architecture,
    method: FinetuningMethod,
    run: TrainingConfig,
    block: Block,
    adapted: tuple[int, ...],
    length: int,
    differs: bool,
    trains: bool,
    again: bool,
) -> Flops:
    """FLOPs of a block whose linears have ranks `adapted`.

    `differs`: its input gets a gradient; `again`: it is recomputed.
    """

    def used(linear: Linear) -> float:  # share of its weights that a token meets
        if linear.experts == 1 or model.style.all_experts:
            return 1
        return min(1, model.style.top_k / linear.experts)

    frozen = 2 * sum(linear.weights * used(linear) for linear in block.linears)
    frozen += 2 * block.router.weights if block.router else 0
    pairs = zip(model.adaptable(block), adapted, strict=True)
    added = 2 * sum(
        method.linear_parameters(linear, rank) * used(linear) for linear, rank in pairs if rank
    )
    # scores and weighted values: 2 FLOPs per head, element and key; a fused causal kernel skips
    # half of the keys
    keys = length if run.attention == "eager" or model.style.eager_only else length / 2
    heads = model.heads_of(block)
    scores = 2.0 * heads.queries * (heads.size + heads.value_size) * keys
    if block.kind == "delta":  # products within a chunk, and those with the state
        K, V = heads.size, heads.value_size
        scores = 2.0 * heads.queries * (3 * K * V + CHUNK * (3 * K + 2 * V))
    forward = frozen + added + scores
    if not differs:
        return Flops(forward, attention=scores)
    # scores have two inputs, each with a gradient
    backward = forward + added + scores + (frozen if trains else 0)
    return Flops(forward, forward if again else 0, backward, scores * (4 if again else 3))


def dequantized_bytes(model: Architecture, method: FinetuningMethod, run: TrainingConfig) -> float:
    """Bytes moved in a step where each product expands its quantized weights to 16 bit."""
    kind = precision(run.precision)
    if not kind.quantized:
        return 0
    first = first_trained(model, method)
    passes = 0
    for index, block in enumerate(model.blocks):
        times = 1 + (index >= first) * (1 + run.checkpointed(index))
        passes += times * sum(linear.weights for linear in block.linears)
    return passes * (kind.bytes + kind.compute)


def format_hours(low: float, high: float) -> str:
    """A range in minutes, hours or days, in the unit that suits its longer end."""
    unit, size = next(
        ((u, s) for u, s in (("d", 24), ("h", 1), ("min", 1 / 60)) if high >= 2 * s),
        ("s", 1 / 3600),
    )
    ends = (f"{x:,.0f}" if x >= 9.95 else f"{x:.2g}" for x in (low / size, high / size))
    return f"{'–'.join(ends)} {unit}"
