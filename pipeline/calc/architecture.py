"""A model as the calculator sees it: the shapes of its weights, and how its blocks compute."""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple, Self

from msgspec import Struct
from msgspec.structs import replace

from pipeline.calc.target_modules import HEAD

# The linear that ends attention or a feed-forward, by the last part of its name in the different
# families.
LAST = {
    "o_proj",
    "out_proj",
    "c_proj",
    "dense",
    "down_proj",
    "fc2",
    "dense_4h_to_h",
    "output_linear",
}


class Linear(NamedTuple):
    """A weight (outputs, inputs), or `experts` of them in one tensor, by its name in the block."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 1

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.experts

    @property
    def is_last(self) -> bool:
        """Whether it maps the heads or the inner neurons back to the width of the model."""
        return self.name.rsplit(".", 1)[-1] in LAST and ".intermediate." not in f".{self.name}"

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs * self.experts if self.bias else 0)

    def lora(self, rank: int) -> int:
        """Parameters of A (R, I) and B (O, R), one pair per expert (Hu et al. 2021)."""
        return rank * (self.inputs + self.outputs) * self.experts


class Heads(NamedTuple):
    """Attention heads: `keys` key/value heads serve `queries`.

    `size` and `value_size`: elements of a key and of a value.
    """

    queries: int
    keys: int
    size: int
    value_size: int


class Block(Struct, frozen=True):
    """One transformer block: linears by group, a router, parameters of norms and of the rest.

    `kind`: how tokens are mixed. "latent": multi-head latent attention, whose keys and values are
    expanded from a compressed one (DeepSeek-V2); "delta": a gated delta net, linear attention with
    a state per head (Qwen3-Next).
    """

    attention: tuple[Linear, ...]
    feed_forward: tuple[Linear, ...]  # experts first; then those that every token uses
    norms: int
    router: Linear | None = None
    other: int = 0  # attention sinks; a delta net's convolution, decays and norm
    kind: Literal["attention", "latent", "delta"] = "attention"
    heads: Heads | None = None  # if they are not the architecture's
    # whether positions rotate its queries and keys, if they do in this architecture
    rotates: bool = True

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.attention + self.feed_forward

    @property
    def parameters(self) -> int:
        router = self.router.parameters if self.router else 0
        return sum(linear.parameters for linear in self.linears) + self.norms + router + self.other


class BlockStyle(NamedTuple):
    """How a block computes, as far as this affects the memory of a training step."""

    norm: Literal["rms", "rms32", "layer"] = "rms"  # rms32: the weight is applied in fp32
    # of the residual branches
    norms: Literal["before", "after", "both", "inside", "parallel"] = "before"
    # rotated: after the rotation, without a weight
    qk_norm: Literal["", "head", "width", "rotated"] = ""
    activation: str = "silu"
    gated: bool = True
    clamps: bool = False  # gate and up are clamped (gpt-oss)
    rotary: float = 1.0  # share of the head that is rotated
    rejoins: bool = False  # rotated and unrotated parts are concatenated
    softmax32: bool = True  # eager attention's softmax is computed in fp32
    softcap: bool = False  # of the attention scores
    sinks: bool = False  # attention sinks: a learned score per head in the softmax
    final_softcap: bool = False
    scaled_queries: bool = False  # OPT multiplies q by its scale outside attention
    scaled_embeddings: bool = False
    # residual branches and logits are multiplied by constants (Granite)
    scaled_branches: bool = False
    top_k: int = 0  # experts per token
    router32: bool = False  # the experts' weights, and with them their outputs, stay in fp32
    linear_router: bool = False  # the router is a linear, which all-linear adapts
    # each token passes through every expert, scaled by the router (Llama 4 in transformers)
    all_experts: bool = False
    complex_rotary: bool = False  # positions rotate in fp32, as complex numbers
    # each block has a dense feed-forward and experts, with norms of their own (Gemma 4)
    experts_beside: bool = False
    value_norm: bool = False  # values are normalized, without a weight
    # attention's output is multiplied by the sigmoid of half of q_proj's (Qwen3-Next)
    output_gate: bool = False
    # PEFT adapts experts as the separate gate, up and down of older checkpoints
    split_experts: bool = False
    ours: bool = False  # MiniGPT, not a model of transformers
    unknown: bool = False  # only the shapes of the linears are known

    @property
    def eager_only(self) -> bool:
        """Whether torch has no fused kernel for its attention."""
        return self.softcap or self.sinks


class Architecture(Struct, frozen=True, dict=True):
    """A model's shapes; `positions`, `head_bias` and norms are parameter counts.

    `tied`: the head is the embedding.

    `layers` is the name of the list of blocks in the transformers model, `head_name` that of its
    output head.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    blocks: tuple[Block, ...]
    embedding_width: int
    final_norm: int
    tied: bool
    positions: int = 0
    fixed_positions: int = 0  # elements of a position table that is not a parameter
    head_bias: int = 0
    extra_norms: int = 0
    outside: tuple[Linear, ...] = ()  # linears outside the blocks, without the head
    style: BlockStyle = BlockStyle()
    layers: str = "model.layers"
    head_name: str = HEAD
    name: str = ""
    source: str = ""
    published: str = ""
    notes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        """Hash of a few fields: hashing every block would take longer than the caches save."""
        return hash((self.name, self.source, self.family, self.hidden, len(self.blocks)))

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.embedding_width

    @property
    def head(self) -> int:
        """Parameters of the output head; only its bias if it is tied to the embedding."""
        return (0 if self.tied else self.vocabulary * self.embedding_width) + self.head_bias

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Every adaptable linear with its full name, such as `model.layers.0.self_attn.q_proj`."""
        for index, block in enumerate(self.blocks):
            for linear in self.adaptable(block):
                yield self.block_name(index) + linear.name, linear
        for linear in (*self.outside, self.head_linear):
            yield linear.name, linear

    def matrices(self, first: int = 0) -> list[tuple[int, int]]:
        """The shapes of the linears of the blocks from `first` on, but of stacked experts."""
        linears = chain.from_iterable(map(self.adaptable, self.blocks[first:]))
        return [(linear.outputs, linear.inputs) for linear in linears if linear.experts == 1]

    def block_name(self, index: int) -> str:
        """Prefix of the full names of a block's linears."""
        return f"{self.layers}.{index}."

    @property
    def head_linear(self) -> Linear:
        return Linear(self.head_name, self.embedding_width, self.vocabulary, bool(self.head_bias))

    def adaptable(self, block: Block) -> tuple[Linear, ...]:
        """The block's linears that can get LoRA, and the router if it can."""
        routed = block.router and (self.style.split_experts or self.style.linear_router)
        return (*block.linears, block.router) if routed and block.router else block.linears

    def ranks_in(self, index: int, by_name: Mapping[str, int]) -> tuple[int, ...]:
        """Ranks of a block's adaptable linears by their full names; 0 for those not adapted."""
        prefix, linears = self.block_name(index), self.adaptable(self.blocks[index])
        return tuple(by_name.get(prefix + linear.name, 0) for linear in linears)

    def components(self) -> dict[str, int]:
        """Parameters by component, without zero entries."""
        parts: Counter[str] = Counter({"embeddings": self.embedding, "positions": self.positions})
        for block in self.blocks:
            parts["attention"] += sum(linear.parameters for linear in block.attention) + block.other
            for linear in block.feed_forward:
                parts["experts" if linear.experts > 1 else "feed-forward"] += linear.parameters
            parts["router"] += block.router.parameters if block.router else 0
            parts["norms"] += block.norms
        parts["norms"] += self.final_norm + self.extra_norms
        parts["other linears"] = sum(linear.parameters for linear in self.outside)
        parts["head"] = self.head
        return {name: count for name, count in parts.items() if count}

    @cached_property
    def total(self) -> int:
        return sum(self.components().values())

    @cached_property
    def quantizable(self) -> int:
        """Weights that are quantized: the linears of the blocks, without biases."""
        linears = chain.from_iterable(block.linears for block in self.blocks)
        return sum(linear.weights for linear in linears)

    def with_every_block(self, block: Block) -> Self:
        return replace(self, blocks=(block,) * len(self.blocks))

    def heads_of(self, block: Block) -> Heads:
        return block.heads or Heads(self.heads, self.kv_heads, self.head_size, self.head_size)

    def kv_bytes(self, batch: int, sequence: int, width: int = 2) -> int:
        """KV cache of `sequence` tokens, and the fp32 states of linear attention.

        `width`: bytes per element.
        """
        elements = states = 0
        for block, count in Counter(self.blocks).items():
            elements += count * self._cached(block)
            if block.kind == "delta":
                heads = self.heads_of(block)
                states += count * heads.queries * heads.size * heads.value_size
        return batch * (elements * sequence * width + states * 4)

    def _cached(self, block: Block) -> int:
        """Elements of the cache per token: keys and values, or the latent of both."""
        if block.kind == "latent":
            return next(linear.outputs for linear in block.attention if "kv_a_proj" in linear.name)
        heads = self.heads_of(block)
        return 0 if block.kind == "delta" else heads.keys * (heads.size + heads.value_size)


class Model(Struct, frozen=True):
    """Shapes, and the config they come from, if any (tracing builds the model from it)."""

    shapes: Architecture
    config: Mapping[str, Any] | None = None
