"""Shapes from the tensors' names and sizes alone, for an architecture that no config describes."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline.calc.shapes import Architecture, Block, Linear, Style
from pipeline.errors import UserError
from pipeline.targets import means

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # name → (dtype, shape)

_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"experts\.(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(lm_head|embed_out|^output)\.(weight|bias)$")
_POSITIONS = re.compile(r"(wpe|embed_positions|position_embeddings)\.weight$")
_TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)$")  # GPT-2 stores (inputs, outputs)
_PACKED = ("I32", "U8", "I8")


def from_shapes(tensors: Shapes, config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture that these tensors are. Head counts come from `config` where it has them."""
    packed = [name for name, (dtype, shape) in tensors.items() if dtype in _PACKED and len(shape) > 1]
    if packed:
        raise UserError(f"{source}: {packed[0]} holds packed, quantized weights. Give the model it was made from.")
    embedding = next((shape for name, (_, shape) in tensors.items() if _EMBEDDING.search(name)), None)
    blocks, rest = _split(tensors)
    prefix = next((match[1] for name in tensors if (match := _LAYER.match(name))), "")
    if embedding is None or not blocks:
        raise UserError(f"{source}: no embedding and numbered layers are among its tensors. Is it a language model?")
    vocabulary, width = embedding
    head = [shape for name, shape in rest.items() if _HEAD.search(name)]
    positions = sum(_size(shape) for name, shape in rest.items() if _POSITIONS.search(name))
    others = {n: s for n, s in rest.items() if not (_HEAD.search(n) or _POSITIONS.search(n) or _EMBEDDING.search(n))}
    built = [_block(blocks[index]) for index in sorted(blocks)]
    first = built[0]
    heads, kv_heads, head_size = _heads(first, config, width)
    return Architecture(
        family="unknown",
        hidden=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        context=int(config.get("max_position_embeddings") or 2**20),
        blocks=_shared(built),
        embedding_width=width,
        final_norm=sum(map(_size, others.values())),
        tied=not any(len(shape) > 1 for shape in head),
        positions=positions,
        head_bias=sum(_size(shape) for shape in head if len(shape) == 1),
        style=Style(gated=len(first.feed_forward) != 2, unknown=True),
        layers=prefix,
        source=source,
        notes=("shapes from headers: parameters are exact, activations are estimated as Llama's of these widths",),
    )


def _split(tensors: Shapes) -> tuple[dict[int, dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]]]:
    blocks: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    rest = {}
    for name, (_, shape) in tensors.items():
        match = _LAYER.match(name)
        if match:
            blocks[int(match[2])][match[3]] = shape
        else:
            rest[name] = shape
    return dict(blocks), rest


def _block(tensors: Mapping[str, tuple[int, ...]]) -> Block:
    """Matrices are linears, one with `experts` where the same stands under several expert numbers; the rest, norms."""
    counts: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        plain = _EXPERT.sub("experts.", name)
        counts[plain] += 1
        shapes[plain] = shape
    linears, used = [], set()
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if len(shape) < 2 or name.endswith(".bias"):
            continue
        bias = next((b for b in (f"{stem}.bias", f"{stem}_bias") if b in shapes), None)
        outputs, inputs = (shape[-1], shape[-2]) if _TRANSPOSED.search(stem) else (shape[-2], shape[-1])
        stacked = shape[0] if len(shape) == 3 else counts[name]
        linears.append(Linear(stem, inputs, outputs, bias is not None, stacked))
        used |= {name, bias}
    norms = sum(_size(shape) * counts[name] for name, shape in shapes.items() if name not in used)
    attention = tuple(linear for linear in linears if means("attention", linear.name))
    return Block(attention, tuple(linear for linear in linears if linear not in attention), norms)


def _heads(block: Block, config: Mapping[str, Any], width: int) -> tuple[int, int, int]:
    """(heads, key/value heads, head size), from the config or, failing that, heads of 128 (64 in narrow models)."""
    sizes = {linear.name.rsplit(".", 1)[-1]: linear.outputs for linear in block.attention}
    q, k = sizes.get("q_proj", width), sizes.get("k_proj", sizes.get("q_proj", width))
    given = config.get("num_attention_heads")
    size = config.get("head_dim") or (q // given if isinstance(given, int) and given else 128 if width >= 2048 else 64)
    return max(1, q // size), max(1, k // size), size


def _shared(blocks: list[Block]) -> tuple[Block, ...]:
    """Equal blocks as one object, so that a run of them is known by identity."""
    seen: dict[Block, Block] = {}
    return tuple(seen.setdefault(block, block) for block in blocks)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
