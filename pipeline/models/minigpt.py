"""MiniGPT, the document's model, and weight for weight a stock `OPTForCausalLM`.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.calc.settings import PACK_UP_TO
from pipeline.errors import UserError
from pipeline.files.artifact import write_json
from pipeline.models.base import (
    CausalLM,
    Checkpointing,
    PackedCache,
    Prefix,
    Shape,
    checkpointed,
    next_positions,
)
from pipeline.models.device import keep_freed_memory
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.kernels.low_rank_block import low_rank_block
from pipeline.models.save import CONFIG, WEIGHTS, save_tensors

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
# the others are whole numbers from 1
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
    """The shape of a MiniGPT (the document's Introduction and §9)."""

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
        """The shape that `config` describes. Raises UserError if MiniGPT would compute something
        else.
        """
        for key, value in _FIXED.items():
            if config.get(key) != value:
                raise UserError(f"{source}: {key} is {config.get(key)!r}; MiniGPT needs {value!r}.")
        if config.get("word_embed_proj_dim") != config.get("hidden_size"):
            raise UserError(
                f"{source}: word_embed_proj_dim differs from hidden_size; MiniGPT has one width."
            )
        for key in (key for key in _FIELDS if key not in _NO_SIZES):
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise UserError(
                    f"{source}: {key} must be a whole number from 1, got {config.get(key)!r}."
                )
        if config["hidden_size"] % (2 * config["num_attention_heads"]):
            raise UserError(f"{source}: hidden_size must be a multiple of 2 × num_attention_heads.")
        for key in _NO_SIZES:
            if key not in config:
                raise UserError(
                    f"{source}: {key} is missing. The folder is not a MiniGPT checkpoint."
                )
        return cls(**{field: config[key] for key, field in _FIELDS.items()})


class KVCache:
    """Keys and values of the tokens seen so far: per layer two tensors (B, H, S, K). The methods
    are transformers'.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, with those of the new tokens (B, H, T, K) at the
        end.
        """
        if layer in self.layers:
            keys, values = (
                torch.cat(pair, 2) for pair in zip(self.layers[layer], (keys, values), strict=True)
            )
        self.layers[layer] = (keys, values)
        return keys, values


class Attention(nn.Module):
    """softmax(QKᵀ/√K + causal mask) V, per head, then the output projection (the document's
    §2.1).
    """

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
        cache: KVCache | PackedCache | None,
        segments: Sequence[int] | None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        B, T, D = x.shape
        H, K = self.n_heads, self.head_size
        q = self.q_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
        v = self.v_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
        if isinstance(cache, KVCache):
            k, v = cache.update(k, v, self.layer)  # (B, H, S, K)
        if prefix is not None:
            # (B, H, S, K), the prefix's before each sequence
            k, v = prefix(self.layer, k, v, segments or [T])
        if not uses_cpu_kernels(x.device):
            # few runs are on one
            from pipeline.models.kernels.accelerator_attention import attend_on_accelerator
            from pipeline.models.kernels.plain_attention import Rule

            lengths = [*(segments or [T])]
            cached = (
                cache.update(self.layer, k, v, lengths) if isinstance(cache, PackedCache) else None
            )
            # with each prefix's keys
            spans = [length + (k.shape[2] - T) // len(lengths) for length in lengths]
            if cached is not None:
                spans = [keys.shape[2] for keys, _ in cached]
            y = attend_on_accelerator(q, k, v, lengths, spans, Rule(K**-0.5), cached).transpose(
                1, 2
            )
        elif segments is None:
            y = _causal_attention(q, k, v)
        elif isinstance(cache, PackedCache):
            pairs = zip(
                q.split(list(segments), dim=2),
                cache.update(self.layer, k, v, segments),
                strict=True,
            )
            # (1, H, T, K)
            y = torch.cat([_causal_attention(own, *pair) for own, pair in pairs], dim=2)
        elif k.shape[2] == T <= PACK_UP_TO:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=_segment_mask(tuple(segments), x.dtype)
            )
        else:
            # with each prefix's keys
            spans = [length + (k.shape[2] - T) // len(segments) for length in segments]
            parts = zip(
                q.split(list(segments), dim=2),
                k.split(spans, dim=2),
                v.split(spans, dim=2),
                strict=True,
            )
            y = torch.cat([_causal_attention(*part) for part in parts], dim=2)  # (B, H, T, K)
        out: Tensor = self.out_proj(y.transpose(1, 2).reshape(B, T, D))  # (B, H, T, K) → (B, T, D)
        return out


@lru_cache(maxsize=16)  # all layers of a step use the same mask
def _segment_mask(segments: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(T, T) on the CPU: 0 where a token sees a token of its own sequence up to itself, else −∞."""
    # (T,): each token's sequence
    sequence = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
    visible = (sequence[:, None] == sequence).tril()
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, K); query t sees the first S - T keys, which precede the T tokens, and those of
    tokens 0 to t.
    """
    T, S = q.shape[2], k.shape[2]
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


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
        cache: KVCache | PackedCache | None,
        segments: Sequence[int] | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        if cache is None and prefix is None and torch.is_grad_enabled():
            fused = self._fused(x, segments)
            if fused is not None:
                return fused
        x = x + self.self_attn(self.self_attn_layer_norm(x), cache, segments, prefix)
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return out

    def _fused(self, x: Tensor, segments: Sequence[int] | None) -> Tensor | None:
        """The same in one call, if only low-rank updates train."""
        if not uses_cpu_kernels(x.device) or (segments is not None and x.shape[1] > PACK_UP_TO):
            return None
        own, mask = self.self_attn, None
        linears = (own.q_proj, own.k_proj, own.v_proj, own.out_proj)
        norms = (self.self_attn_layer_norm, self.final_layer_norm)
        if segments is not None:
            mask = _segment_mask(tuple(segments), x.dtype)
        return low_rank_block(x, norms, linears, (self.fc1, self.fc2), own.n_heads, mask, segments)


class SinusoidalPositions(nn.Module):
    """sin and cos of position × 10000^(-2i/D), fixed (Vaswani et al. 2017, §3.5)."""

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
        cache: KVCache | PackedCache | None,
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
    """The document's model: ids (B, T) → logits (B, T, V)."""

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
