"""A run on several GPUs of one machine: memory, traffic, and the bound on its speed.

Three layouts. `replicated`: every GPU has the base and its own sequences; adapter gradients are
summed. `sharded`: the same, but each has only its rows of every block's frozen weights, and gathers
the others when the block runs, in forward and again in backward (FSDP2;
training/parallel/sharding.py).
`tensor`: all compute the same sequences, each with its share of the heads and of the inner neurons
of every block (Shoeybi et al. 2019), so that outputs of attention and feed-forward are summed.
Norms, embeddings and head are on every GPU in all three.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

from msgspec import structs

from pipeline.calc.architecture import Architecture, Block, Heads, Linear
from pipeline.calc.fit import Gpu, largest, of_size
from pipeline.calc.fit import gpu as find_gpu
from pipeline.calc.memory import Memory, predict, weight_bytes
from pipeline.calc.method import Configuration, FinetuningMethod, ranks, trained_split
from pipeline.calc.report import side_by_side
from pipeline.calc.settings import TrainingConfig, precision
from pipeline.calc.time import dequantized_bytes, first_trained, flops_per_token
from pipeline.errors import UserError

LAYOUTS = ("replicated", "sharded", "tensor")
MOST = 1024  # GPUs of one run
# Blocks whose weights are whole at once: in backward the one that runs and the next, which is
# fetched meanwhile; in forward FSDP2 also holds the previous block's until the next are in place.
# Measured; tests compare.
GATHERED = {"forward": 3, "backward": 2}


_predict = lru_cache(maxsize=32)(predict)  # the same step for every number of GPUs


class Devices(NamedTuple):
    """`number` equal GPUs."""

    number: int
    gpu: Gpu


class Traffic(NamedTuple):
    """Bytes of the whole tensors that collectives gather, scatter or sum in a step."""

    gathered_forward: int = 0
    gathered_backward: int = 0
    scattered_gradients: int = 0
    reduced_gradients: int = 0
    reduced_activations: int = 0

    def received(self, count: int) -> "Traffic":
        """Bytes that each of `count` devices receives, and sends, in ring algorithms.

        (N-1)/N of what is gathered or scattered, twice that of what is summed on all (Patarasuk and
        Yuan 2009).
        """
        factors = (1, 1, 1, 2, 2)
        return Traffic(
            *(round(f * size * (count - 1) / count) for f, size in zip(factors, self, strict=True))
        )


class Layout(NamedTuple):
    """A run in one layout, per device: seconds of products, of exchange, of a step at the least.

    None where the GPU's peak or link is unknown. `tokens_per_second`: of all devices together.
    """

    name: str
    memory: Memory
    traffic: Traffic
    compute: float | None
    exchange: float | None
    step: float | None
    tokens_per_second: float | None


def parse_devices(text: str) -> Devices:
    """GPUs such as 8xH100, 2xA100-40GB or 4x24GB (memory alone). Raises UserError."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})\s*[xX×]\s*(\S.{0,40})", text.strip())
    if not match or int(match[1]) > MOST:
        raise UserError(
            f"gpus must be a number up to {MOST:,} and a GPU, such as 8xH100 or 4x24GB, got "
            f"{text[:40]!r}."
        )
    name = (
        re.sub(r"[\s-]*([0-9.]+)\s*gb$", r"-\1", match[2].strip().lower())
        .replace(" ", "")
        .strip("-")
    )
    size = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", name)
    return Devices(int(match[1]), of_size(float(name), "gpus") if size else find_gpu(name))


def why_not(layout: str, model: Architecture, count: int) -> str | None:
    """Why a model cannot run in this layout on `count` devices; None if it can."""
    if layout != "tensor":
        return None
    if model.style.unknown or any(block.kind != "attention" for block in model.blocks):
        return (
            "tensor parallel is counted for plain attention, which this model does not have in "
            "every block"
        )
    for block in _kinds(model):
        heads = model.heads_of(block)
        sizes = {"heads": heads.queries, "key and value heads": heads.keys}
        sizes |= {f"inner neurons of {b.name}": b.inputs for b in block.feed_forward if b.is_last}
        for name, size in sizes.items():
            if size % count:
                return f"{size:,} {name} cannot be divided among {count} GPUs"
    return None


def layout(
    name: str, model: Architecture, method: FinetuningMethod, run: TrainingConfig, devices: Devices
) -> Layout:
    """The run in layout `name`, which must be possible (`why_not`). Raises UserError."""
    count, gpu = devices
    local = tensor_share(model, count) if name == "tensor" else model
    memory = shard(model, method, run, count) if name == "sharded" else predict(local, method, run)
    traffic = _TRAFFIC[name](model, method, run, count)
    compute = _seconds(local, method, run, gpu)
    if gpu.link is None:
        return Layout(name, memory, traffic, compute, None, None, None)
    seconds = [size / (gpu.link * 1e9) for size in traffic.received(count)]
    gathers, reductions = sum(seconds[:3]), sum(seconds[3:])
    # gathers are fetched while another block computes; sums are waited for
    step = None if compute is None else max(compute, gathers) + reductions
    tokens = run.tokens * (1 if name == "tensor" else count)
    return Layout(
        name, memory, traffic, compute, gathers + reductions, step, step and tokens / step
    )


def _seconds(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, gpu: Gpu
) -> float | None:
    """The step's products at the GPU's peak, and dequantizing at its memory's bandwidth.

    None in fp32, whose peak is not in the table.
    """
    if gpu.tflops is None or gpu.gbps is None or run.precision == "fp32":
        return None
    peak = gpu.tflops * 1e12 / (2 if run.width == 4 else 1)
    flops = flops_per_token(model, method, run).total * run.tokens
    return flops / peak + dequantized_bytes(model, method, run) / (gpu.gbps * 1e9)


# sharded


def shard(model: Architecture, method: FinetuningMethod, run: TrainingConfig, count: int) -> Memory:
    """Memory per device with the blocks' weights, gradients and moments over `count` devices.

    This project's trainer shards frozen weights only, FSDP2 also those that train.
    """
    memory = _predict(model, method, run)
    shares = {block: share_bytes(block, run, count) for block in _kinds(model)}
    local = sum(shares[block] * number for block, number in _kinds(model).items())
    whole = sum(share_bytes(block, run, 1) * number for block, number in _kinds(model).items())
    alive = GATHERED["forward" if memory.where.startswith("forward") else "backward"]
    gathered = min(alive, len(model.blocks)) * count * max(shares.values())
    weights = weight_bytes(model, run.precision) - whole + local + gathered
    trained = sum(
        block.parameters for block in model.blocks[method.trained_base(model).first_block :]
    )
    if not trained:
        return memory._replace(weights=weights)
    left = 1 - trained / sum(trained_split(model, method)) * (1 - 1 / count)
    # a block's own are whole until they are scattered
    gradients = round(memory.gradients * left) + gathered
    return memory._replace(
        weights=weights, gradients=gradients, optimizer=round(memory.optimizer * left)
    )


def share_bytes(block: Block, run: TrainingConfig, count: int) -> int:
    """Bytes of a block's weights on each of `count` devices.

    Every device has the same number of rows of each tensor; those of the last may be padding.
    """
    kind = precision(run.precision)
    total = 0
    for linear in (*block.linears, *([block.router] if block.router else [])):
        rows = linear.experts if linear.experts > 1 else linear.outputs
        if kind.quantized and linear is not block.router:  # codes and scales are long vectors
            total += ceil(linear.weights * kind.bytes / count)
        else:
            total += ceil(rows / count) * (linear.weights // rows) * kind.compute
        total += ceil(linear.outputs / count) * linear.experts * kind.compute if linear.bias else 0
    return total + ceil((block.norms + block.other) / count) * kind.compute


def _sharded_traffic(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, count: int
) -> Traffic:
    sizes = [count * share_bytes(block, run, count) for block in model.blocks]
    first, trained = first_trained(model, method), method.trained_base(model).first_block
    reduced = _replicated_traffic(model, method, run, count).reduced_gradients
    reduced -= 4 * sum(block.parameters for block in model.blocks[trained:])  # they are scattered
    # Backward of a block fetches the block before it: also that of the first with a gradient.
    return Traffic(sum(sizes), sum(sizes[max(0, first - 1) :]), sum(sizes[trained:]), reduced)


def _replicated_traffic(
    model: Architecture, method: FinetuningMethod, _run: TrainingConfig, _count: int
) -> Traffic:
    # one collective, in fp32
    return Traffic(reduced_gradients=4 * sum(trained_split(model, method)))


# tensor parallel


@lru_cache(maxsize=32)
def tensor_share(model: Architecture, count: int) -> Architecture:
    """What one of `count` devices computes: its heads, and its inner neurons."""

    def split(linear: Linear) -> Linear:
        if linear.is_last:
            return linear._replace(inputs=linear.inputs // count)
        if linear.outputs < count:
            return linear
        return linear._replace(outputs=linear.outputs // count)

    def split_block(block: Block) -> Block:
        h = model.heads_of(block)
        return structs.replace(
            block,
            attention=tuple(map(split, block.attention)),
            feed_forward=tuple(map(split, block.feed_forward)),
            heads=Heads(h.queries // count, h.keys // count, h.size, h.value_size),
        )

    blocks = {block: split_block(block) for block in _kinds(model)}
    return structs.replace(
        model,
        heads=model.heads // count,
        kv_heads=model.kv_heads // count,
        blocks=tuple(blocks[block] for block in model.blocks),
    )


def _tensor_traffic(
    model: Architecture, method: FinetuningMethod, run: TrainingConfig, _count: int
) -> Traffic:
    """Sums of the outputs of attention and feed-forward, and of their inputs' gradients.

    A checkpointed block sums attention's output again. The factor of LoRA that every device has
    whole, A of a linear split by outputs and B of one split by inputs, gets a part of its gradient
    from each.
    """
    first, base = first_trained(model, method), method.trained_base(model)
    blocks = range(first, len(model.blocks))
    sums = 2 * len(model.blocks) + 2 * len(blocks) + sum(map(run.checkpointed, blocks))
    # the first block's own input needs no gradient
    sums -= bool(blocks) and not base.ends and not method.positions
    tokens = run.tokens + run.virtual_places * method.positions
    by_name = ranks(model, method)
    replicated = 0
    for index, block in enumerate(model.blocks):
        for linear in block.linears:  # the head and routers are whole everywhere
            rank = by_name.get(model.block_name(index) + linear.name, 0)
            width = linear.outputs if linear.is_last else linear.inputs
            replicated += rank * width * linear.experts
    return Traffic(
        reduced_gradients=4 * replicated * method.low_rank,
        reduced_activations=sums * tokens * model.hidden * run.width,
    )


_TRAFFIC = {
    "replicated": _replicated_traffic,
    "sharded": _sharded_traffic,
    "tensor": _tensor_traffic,
}


@lru_cache(maxsize=32)
def _kinds(model: Architecture) -> Mapping[Block, int]:
    """Each different block, with how many there are."""
    return Counter(model.blocks)


# what fits


def least(
    name: str, model: Architecture, method: FinetuningMethod, run: TrainingConfig, gpu: Gpu
) -> int | None:
    """The least number of these GPUs on which the run fits; None if none up to MOST does."""
    if predict(model, method, run).peak <= gpu.bytes:
        return 1
    if name == "replicated":
        return None

    def peak(count: int) -> int:
        if name == "sharded":
            return shard(model, method, run, count).peak
        return predict(tensor_share(model, count), method, run).peak

    counts = (count for count in range(2, MOST + 1) if why_not(name, model, count) is None)
    return next((count for count in counts if peak(count) <= gpu.bytes), None)


def largest_of(
    name: str, model: Architecture, method: FinetuningMethod, run: TrainingConfig, devices: Devices
) -> dict[str, int]:
    """The largest batch and sequence that fit, the rest as given; 0 if none does."""
    local, budget = model, devices.gpu.bytes
    if name == "tensor":
        local = tensor_share(model, devices.number)
    elif name == "sharded":  # what sharding saves depends on neither
        budget += predict(model, method, run).peak - shard(model, method, run, devices.number).peak
    found = largest(local, method, run, budget)
    return {"batch": found.batch, "sequence": found.sequence}


def answer(
    model: Architecture, given: Configuration, devices: Devices, sharded: bool | None = None
) -> dict[str, Any]:
    """Full fine-tuning, the adapter and the adapter on NF4, in each layout: bytes per device.

    `sharded`: True for that layout alone, False for the others, None for all. Raises UserError for
    invalid settings.
    """
    methods, method, run = given
    count, gpu = devices
    names = [name for name in LAYOUTS if sharded is None or sharded == (name == "sharded")]
    reasons = {name: why_not(name, model, count) for name in names}
    names = [name for name in names if not reasons[name]]
    rows = []
    for title, (m, r, _) in side_by_side(model, method, run, methods).items():
        for name in names:
            found = layout(name, model, m, r, devices)
            received = found.traffic.received(count)
            rows.append(
                {
                    "method": title,
                    "layout": name,
                    "memory": {**found.memory.parts(), "peak": found.memory.peak},
                    "fits": found.memory.peak <= gpu.bytes,
                    "least_gpus": least(name, model, m, r, gpu),
                    "received": received._asdict(),
                    "moved": sum(received),
                    "compute_seconds": found.compute,
                    "exchange_seconds": found.exchange,
                    "seconds": found.step,
                    "tokens_per_second": found.tokens_per_second,
                }
            )
    return {
        "model": model.name,
        "gpus": {"count": count, **gpu._asdict()},
        "runs": rows,
        "largest": {name: largest_of(name, model, method, run, devices) for name in names},
        "notes": [
            *(f"tensor: {reason}" for reason in reasons.values() if reason),
            *_notes(method, run, gpu),
        ],
    }


def _notes(method: FinetuningMethod, run: TrainingConfig, gpu: Gpu) -> Iterator[str]:
    """What the numbers assume."""
    yield (
        "replicated, sharded: each GPU has sequences of its own; tensor: all compute the same ones"
    )
    yield (
        "sharded: two blocks are whole at a time; trainable weights, embeddings and head are on "
        "every GPU"
    )
    if not method.adapter:
        yield "full, sharded: as FSDP2 does it; this project's trainer shards frozen weights only"
    if gpu.link is None:
        yield f"no speed: of {gpu.label} only the memory is known"
        return
    yield (
        "moved: bytes that each GPU receives in a step, and sends, in rings, at the link's full "
        "bandwidth"
    )
    if run.precision == "fp32":
        yield "no speed: the table has 16-bit and TF32 peaks; use --precision bf16 or tf32"
    yield (
        "step: at least so long, with products at the GPU's peak and gathering behind them; sums "
        "are waited for"
    )
