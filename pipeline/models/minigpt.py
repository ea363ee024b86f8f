"""MiniGPT, a small Transformer of this project, and weight for weight a stock `OPTForCausalLM`.

Dimensions, here and everywhere: B batch, T tokens, D width, H heads, K head size, V vocabulary, R
rank, I and O a layer's inputs and outputs, S tokens seen so far (cached + new).

Attributes have OPT's names, so that the state dict is the checkpoint: no table of renamings. The
token embeddings are stored as they are added (multiplied by the original Transformer's sqrt(D)
already), and the sinusoids start at row 2 of `embed_positions`, where OPT looks for position 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.calc.settings import PACK_UP_TO
from pipeline.errors import UserError
from pipeline.files.artifact import write_json
from pipeline.files.text import abbreviate_repr
from pipeline.models.base import (
    CausalLM,
    Checkpointing,
    Prefix,
    Shape,
    checkpointed,
    next_positions,
)
from pipeline.models.device import keep_freed_memory
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.kernels.low_rank_block import low_rank_block
from pipeline.models.kernels.plain_attention import (
    Rule,
    attend_each,
    attend_row,
    split_sequences,
)
from pipeline.models.save import CONFIG, WEIGHTS, save_tensors

if TYPE_CHECKING:
    from pipeline.models.pages import PackedCache

OPT_OFFSET = 2  # rows of OPT's position table that no position uses
EMBEDDING_STD = 0.3

_FIELDS = {  # OPT's keys, in the order in which they are written, and the fields of MiniGPTConfig
    "vocab_size": "vocab_size",
    "pad_token_id": "pad_id",
    "eos_token_id": "end_id",
    "hidden_size": "d_model",
    "word_embed_proj_dim": "d_model",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "ffn_dim": "feed_forward",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tie_embeddings",
}
# the others are sizes: whole numbers from 1
_NO_SIZES = ("pad_token_id", "eos_token_id", "tie_word_embeddings")
_FIXED: dict[str, Any] = {  # what makes an OPT a MiniGPT
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "gelu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "bos_token_id": None,
    "dtype": "float32",
}


@dataclass(frozen=True)
class MiniGPTConfig:
    """The shape of a MiniGPT."""

    vocab_size: int
    pad_id: int
    end_id: int
    d_model: int = 64
    layers: int = 2
    heads: int = 4
    feed_forward: int = 256
    max_positions: int = 32
    tie_embeddings: bool = False

    def to_opt(self) -> dict[str, Any]:
        """config.json of the OPTForCausalLM that computes the same function."""
        return {**{key: getattr(self, field) for key, field in _FIELDS.items()}, **_FIXED}

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        """Whether `config` is a MiniGPT's; transformers opens any other OPT."""
        return all(config.get(key) == value for key, value in _FIXED.items())

    @classmethod
    def from_opt(cls, config: dict[str, Any], source: str) -> "MiniGPTConfig":
        """The shape that `config` describes. Raises UserError if it is not a MiniGPT's."""
        for key, value in _FIXED.items():
            if config.get(key) != value:
                raise UserError(f"{source}: {key} is {config.get(key)!r}; MiniGPT needs {value!r}.")
        if config.get("word_embed_proj_dim") != config.get("hidden_size"):
            raise UserError(
                f"{source}: word_embed_proj_dim differs from hidden_size; MiniGPT has one width. "
                "Copy it again."
            )
        for key in _FIELDS:
            size = config.get(key)
            if key not in _NO_SIZES and (type(size) is not int or size < 1):
                raise UserError(
                    f"{source}: {key} must be a whole number from 1, got {abbreviate_repr(size)}. "
                    "Copy it again."
                )
        if config["hidden_size"] % (2 * config["num_attention_heads"]):
            raise UserError(
                f"{source}: hidden_size must be a multiple of 2 × num_attention_heads. Copy it "
                "again."
            )
        for key in _NO_SIZES:
            if key not in config:
                raise UserError(
                    f"{source}: {key} is missing. The folder is not a MiniGPT checkpoint."
                )
        return cls(**{field: config[key] for key, field in _FIELDS.items()})


class KVCache:
    """Keys and values of the tokens seen so far. The methods are transformers'."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # (B, H, S, K) each

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, the new ones (B, H, T, K) at the end."""
        if layer in self.layers:
            before = self.layers[layer]
            keys, values = torch.cat((before[0], keys), 2), torch.cat((before[1], values), 2)
        self.layers[layer] = (keys, values)
        return keys, values


class Attention(nn.Module):
    """softmax(QKᵀ/√K + causal mask) V, per head, then the output projection."""

    def __init__(self, d_model: int, heads: int, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.head_size = layer, heads, d_model // heads
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.q_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        x: Tensor,
        cache: "KVCache | PackedCache | None",
        segments: Sequence[int] | None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        B, T, D = x.shape
        H, K = self.n_heads, self.head_size
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))  # (B, T, D) each
        q, k, v = (y.view(B, T, H, K).transpose(1, 2) for y in projected)  # (B, H, T, K) each
        lengths = [*(segments or [T])]
        rule = Rule(K**-0.5)
        pages = None  # of a PackedCache
        if isinstance(cache, KVCache):
            k, v = cache.update(k, v, self.layer)  # (B, H, S, K)
        if prefix is not None:
            k, v = prefix(self.layer, k, v, lengths)  # (B, H, S, K), before each sequence's own
        spans = [length + (k.shape[2] - T) // len(lengths) for length in lengths]
        if cache is not None and not isinstance(cache, KVCache):
            pages = cache.append(self.layer, k, v)
            spans = cache.spans

        if not uses_cpu_kernels(x.device):
            # a run on a CPU does not load it
            from pipeline.models.kernels.accelerator_attention import attend_on_accelerator

            y = attend_on_accelerator(q, k, v, lengths, spans, rule, pages)
        elif segments is None:
            y = attend_row(q, k, v, rule).transpose(1, 2)
        elif pages is None and k.shape[2] == T <= PACK_UP_TO:
            mask = _segment_mask(tuple(segments), x.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        else:
            pairs = split_sequences(k, v, spans) if pages is None else pages.pairs()
            y = attend_each(q, pairs, lengths, rule)
        out: Tensor = self.out_proj(y.reshape(B, T, D))  # (B, T, H, K) → (B, T, D)
        return out


@lru_cache(maxsize=16)  # all layers of a step use the same mask
def _segment_mask(segments: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(T, T) on the CPU: 0 where a token sees a token of its own sequence up to itself, else −∞."""
    # (T,): each token's sequence
    sequence = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
    visible = (sequence[:, None] == sequence).tril()
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): pre-LayerNorm."""

    def __init__(self, config: MiniGPTConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config.d_model, config.heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.feed_forward)
        self.fc2 = nn.Linear(config.feed_forward, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        cache: "KVCache | PackedCache | None",
        segments: Sequence[int] | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        if cache is None and prefix is None and torch.is_grad_enabled():
            out = self._fused(x, segments)
            if out is not None:
                return out
        x = x + self.self_attn(self.self_attn_layer_norm(x), cache, segments, prefix)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))  # type: ignore[no-any-return]

    def _fused(self, x: Tensor, segments: Sequence[int] | None) -> Tensor | None:
        """`forward` in one call if only low-rank updates train; else None."""
        if not uses_cpu_kernels(x.device) or (segments is not None and x.shape[1] > PACK_UP_TO):
            return None
        attention = self.self_attn
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        norms = (self.self_attn_layer_norm, self.final_layer_norm)
        mask = None if segments is None else _segment_mask(tuple(segments), x.dtype)
        feed_forward = (self.fc1, self.fc2)
        return low_rank_block(x, norms, linears, feed_forward, attention.n_heads, mask, segments)


class SinusoidalPositions(nn.Module):
    """sin and cos of position × 10000^(-2i/D), fixed (Vaswani et al. 2017, section 3.5)."""

    weight: Tensor

    def __init__(self, positions: int, d_model: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # arithmetic on the meta device would import torch's compiler
            position = torch.arange(positions, dtype=torch.float64)[:, None]
            rate = torch.exp(
                torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10_000) / d_model)
            )
            table = torch.zeros(positions + OPT_OFFSET, d_model)
            table[OPT_OFFSET:, 0::2] = torch.sin(position * rate)
            table[OPT_OFFSET:, 1::2] = torch.cos(position * rate)
        self.register_buffer("weight", table.to(torch.get_default_device()))

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions + OPT_OFFSET, self.weight)


class Decoder(nn.Module):
    """Embeddings, blocks and the last norm: ids (B, T) → hidden states (B, T, D)."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = SinusoidalPositions(config.max_positions, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.checkpointing: Checkpointing = "none"
        nn.init.normal_(self.embed_tokens.weight, std=EMBEDDING_STD)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        cache: "KVCache | PackedCache | None",
        segments: Sequence[int] | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """`inputs`: ids (B, T), or embeddings (B, T, D)."""
        x = inputs if inputs.is_floating_point() else self.embed_tokens(inputs)  # (B, T, D)
        x = x + self.embed_positions(positions)
        for number, layer in enumerate(self.layers):
            if self.training and checkpointed(self.checkpointing, number):
                x = checkpoint(layer, x, cache, segments, prefix, use_reentrant=False)
            else:
                x = layer(x, cache, segments, prefix)
        out: Tensor = self.final_layer_norm(x)
        return out


class MiniGPT(CausalLM):
    """ids (B, T) → logits (B, T, V)."""

    embedding_name, head_name = "model.decoder.embed_tokens", "lm_head"

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"decoder": Decoder(config)})
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.body.embed_tokens.weight

    @property
    def body(self) -> Decoder:
        decoder = self.model["decoder"]
        assert isinstance(decoder, Decoder)
        return decoder

    @property
    def shape(self) -> Shape:
        c = self.config
        return Shape(c.vocab_size, c.max_positions, c.layers, c.heads, c.tie_embeddings)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.body.layers

    def run_body(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        positions = next_positions(inputs, cache) if positions is None else positions
        out: Tensor = self.body(inputs, positions, cache, segments, prefix)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.lm_head(hidden)
        return out

    def new_cache(self) -> KVCache:
        return KVCache()

    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        cache = KVCache()
        self.run_body(ids, cache=cache)
        return [cache.layers[number] for number in range(len(self.blocks))]

    def describe(self) -> dict[str, Any]:
        return self.config.to_opt()

    @property
    def pack_up_to(self) -> int:
        return PACK_UP_TO

    def prepare_cpu_training(self) -> None:
        keep_freed_memory()  # of 32 adapters a step then takes half the time

    def set_rows(self, rows: int, tied: bool) -> None:
        self.config = replace(self.config, vocab_size=rows, tie_embeddings=tied)

    def checkpoint_blocks(self, how: Checkpointing) -> None:
        self.body.checkpointing = how

    def save(self, folder: Path) -> None:
        write_json(folder / CONFIG, self.describe())
        save_tensors(folder / WEIGHTS, state(self))


def state(model: MiniGPT) -> dict[str, Tensor]:
    """The model's tensors by checkpoint name; a tied head is left out, as it is the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings:
        del tensors[f"{model.head_name}.weight"]
    return tensors
