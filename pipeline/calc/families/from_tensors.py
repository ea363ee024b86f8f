"""Shapes from the tensors' names and sizes alone, for an architecture that no config describes."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Linear
from pipeline.calc.families.config import Config
from pipeline.calc.target_modules import means
from pipeline.errors import UserError

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # name → (dtype, shape)

_LAYER = re.compile(r"^(.*?)\.(\d{1,5})\.(.+)$")
_BUFFER = re.compile(r"(\.attn\.(bias|masked_bias)|inv_freq)$")  # masks and tables that old checkpoints hold
_EXPERT = re.compile(r"experts\.(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(lm_head|embed_out|^output)\.(weight|bias)$")
_POSITIONS = re.compile(r"(wpe|embed_positions|position_embeddings)\.weight$")
_TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)$")  # GPT-2 stores (inputs, outputs)
_PACKED = ("I32", "U8", "I8")


def from_shapes(tensors: Shapes, config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture that these tensors are. Head counts come from `config` where it has them."""
    packed = [name for name, (dtype, shape) in tensors.items() if dtype in _PACKED and len(shape) == 2]
    if packed:
        raise UserError(f"{source}: {packed[0]} holds packed, quantized weights. Give the model it was made from.")
    embedding = next((shape for name, (_, shape) in tensors.items() if _EMBEDDING.search(name)), None)
    blocks, rest = _split(tensors)
    if embedding is None or len(embedding) != 2 or 0 in embedding or not blocks:
        raise UserError(f"{source}: no embedding and numbered layers are among its tensors. Is it a language model?")
    vocabulary, width = embedding
    head = [shape for name, shape in rest.items() if _HEAD.search(name)]
    positions = sum(_size(shape) for name, shape in rest.items() if _POSITIONS.search(name))
    prefix = Counter(stack for stack, _ in blocks).most_common(1)[0][0]
    others = {n: s for n, s in rest.items() if not (_HEAD.search(n) or _POSITIONS.search(n) or _EMBEDDING.search(n))}
    built = [_block(blocks[place]) for place in sorted(blocks)]
    first = built[sorted(blocks).index((prefix, min(index for stack, index in blocks if stack == prefix)))]
    heads, kv_heads, head_size = _heads(first, config, width, source)
    return Architecture(
        family="unknown",
        hidden=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        context=Config(config, source).size("max_position_embeddings", default=2**20),
        blocks=_shared(built),
        embedding_width=width,
        final_norm=sum(map(_size, others.values())),
        tied=not any(len(shape) > 1 for shape in head),
        positions=positions,
        head_bias=sum(_size(shape) for shape in head if len(shape) == 1),
        style=BlockStyle(gated=len(first.feed_forward) != 2, unknown=True),
        layers=prefix,
        source=source,
        notes=("shapes from headers: parameters are exact, activations are estimated as Llama's of these widths",),
    )


def _split(tensors: Shapes) -> tuple[dict[tuple[str, int], dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]]]:
    """Blocks by stack (encoder, decoder, vision tower) and number, and what is in none."""
    blocks: dict[tuple[str, int], dict[str, tuple[int, ...]]] = defaultdict(dict)
    rest = {}
    for name, (_, shape) in tensors.items():
        match = _LAYER.match(name)
        if _BUFFER.search(name) and (len(shape) != 1 or name.endswith("inv_freq")):
            continue
        if match:
            blocks[match[1], int(match[2])][match[3]] = shape
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
        outputs, inputs = shape[-2:]
        rows = shapes[bias][-1] if bias else 0
        if _TRANSPOSED.search(stem) and (rows == inputs or not bias):
            outputs, inputs = inputs, outputs
        stacked = shape[0] if len(shape) == 3 else counts[name]
        linears.append(Linear(stem, inputs, outputs, bias is not None, stacked))
        used |= {name, bias}
    norms = sum(_size(shape) * counts[name] for name, shape in shapes.items() if name not in used)
    attention = tuple(linear for linear in linears if means("attention", linear.name))
    return Block(attention, tuple(linear for linear in linears if linear not in attention), norms)


def _heads(block: Block, config: Mapping[str, Any], width: int, source: str) -> tuple[int, int, int]:
    """(heads, key/value heads, head size), from the config or, failing that, heads of 128 (64 in narrow models)."""
    sizes = {linear.name.rsplit(".", 1)[-1]: linear.outputs for linear in block.attention}
    q, k = sizes.get("q_proj", width), sizes.get("k_proj", sizes.get("q_proj", width))
    guess = max(1, q // (128 if width >= 2048 else 64))
    heads = Config(config, source).size("num_attention_heads", default=guess, most=max(q, 1))
    size = Config(config, source).size("head_dim", default=max(1, q // heads))
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
