"""Shapes from the names and sizes of tensors, for architectures that the registry does not know."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Linear
from pipeline.calc.families.config import Config
from pipeline.calc.target_modules import matches_target
from pipeline.errors import UserError

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # name → (dtype, shape)

_LAYER = re.compile(r"^(.*?)\.(\d{1,5})\.(.+)$")
_BUFFER = re.compile(r"(\.attn\.(bias|masked_bias)|inv_freq)$")  # masks and tables in old checkpoints
_EXPERT = re.compile(r"experts\.(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(lm_head|embed_out|^output)\.(weight|bias)$")
_POSITIONS = re.compile(r"(wpe|embed_positions|position_embeddings)\.weight$")
_TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)$")  # GPT-2 stores (inputs, outputs)
_PACKED = ("I32", "U8", "I8")


def from_shapes(tensors: Shapes, config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture of these tensors; head counts from `config` if it has them. Raises UserError."""
    packed = [name for name, (dtype, shape) in tensors.items() if dtype in _PACKED and len(shape) == 2]
    if packed:
        raise UserError(f"{source}: {packed[0]} contains packed, quantized weights. Give the original model instead.")
    embedding = next((shape for name, (_, shape) in tensors.items() if _EMBEDDING.search(name)), None)
    blocks, rest = _split_blocks(tensors)
    if embedding is None or len(embedding) != 2 or 0 in embedding or not blocks:
        raise UserError(f"{source}: its tensors have no embedding and numbered layers. Is it a language model?")
    vocabulary, width = embedding
    head = [shape for name, shape in rest.items() if _HEAD.search(name)]
    positions = sum(_element_count(shape) for name, shape in rest.items() if _POSITIONS.search(name))
    prefix = Counter(stack for stack, _ in blocks).most_common(1)[0][0]
    others = {n: s for n, s in rest.items() if not (_HEAD.search(n) or _POSITIONS.search(n) or _EMBEDDING.search(n))}
    built = [_build_block(blocks[key]) for key in sorted(blocks)]
    first = built[sorted(blocks).index((prefix, min(index for stack, index in blocks if stack == prefix)))]
    heads, kv_heads, head_size = _head_counts(first, config, width, source)
    return Architecture(
        family="unknown",
        hidden=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        context=Config(config, source).size("max_position_embeddings", default=2**20),
        blocks=_deduplicate(built),
        embedding_width=width,
        final_norm=sum(map(_element_count, others.values())),
        tied=not any(len(shape) > 1 for shape in head),
        positions=positions,
        head_bias=sum(_element_count(shape) for shape in head if len(shape) == 1),
        style=BlockStyle(gated=len(first.feed_forward) != 2, unknown=True),
        layers=prefix,
        source=source,
        notes=("shapes from headers: parameters are exact, activations are estimated as Llama's of these widths",),
    )


def _split_blocks(
    tensors: Shapes,
) -> tuple[dict[tuple[str, int], dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]]]:
    """Tensors of the blocks by (stack, number), where a stack is an encoder, decoder or vision tower, and the rest."""
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


def _build_block(tensors: Mapping[str, tuple[int, ...]]) -> Block:
    """A block whose matrices are linears, equal experts merged into one; all other tensors count as norms."""
    counts: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        plain = _EXPERT.sub("experts.", name)
        counts[plain] += 1
        shapes[plain] = shape
    linears, bound = [], set()
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if len(shape) < 2 or name.endswith(".bias"):
            continue
        bias = next((b for b in (f"{stem}.bias", f"{stem}_bias") if b in shapes), None)
        outputs, inputs = shape[-2:]
        rows = shapes[bias][-1] if bias else 0
        if _TRANSPOSED.search(stem) and (rows == inputs or not bias):
            outputs, inputs = inputs, outputs
        experts = shape[0] if len(shape) == 3 else counts[name]
        linears.append(Linear(stem, inputs, outputs, bias is not None, experts))
        bound |= {name, bias}
    norms = sum(_element_count(shape) * counts[name] for name, shape in shapes.items() if name not in bound)
    attention = tuple(linear for linear in linears if matches_target("attention", linear.name))
    return Block(attention, tuple(linear for linear in linears if linear not in attention), norms)


def _head_counts(block: Block, config: Mapping[str, Any], width: int, source: str) -> tuple[int, int, int]:
    """(heads, key/value heads, head size) from the config; otherwise assumes heads of 128, or 64 in narrow models."""
    sizes = {linear.name.rsplit(".", 1)[-1]: linear.outputs for linear in block.attention}
    q, k = sizes.get("q_proj", width), sizes.get("k_proj", sizes.get("q_proj", width))
    default_heads = max(1, q // (128 if width >= 2048 else 64))
    heads = Config(config, source).size("num_attention_heads", default=default_heads, most=max(q, 1))
    size = Config(config, source).size("head_dim", default=max(1, q // heads))
    return max(1, q // size), max(1, k // size), size


def _deduplicate(blocks: list[Block]) -> tuple[Block, ...]:
    """Replaces equal blocks by one object, so that runs of them are recognized by identity."""
    seen: dict[Block, Block] = {}
    return tuple(seen.setdefault(block, block) for block in blocks)


def _element_count(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
