"""The interface of every model: MiniGPT, and any causal language model that transformers opens.

Dimensions are those of `minigpt/model.py`. Module names are checkpoint names in both, so that targets, adapters and
certificates need no table of renamings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.models.virtual_tokens import VirtualTokens

Checkpointing = Literal["none", "selective", "full"]
# Puts a prefix's keys and values before those of each packed sequence: number of a block, keys and values (B, G, T, K),
# lengths of the sequences → keys and values (B, G, T + n · sequences, K).
Prefix = Callable[[int, Tensor, Tensor, Sequence[int]], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """A model's sizes: rows of its embedding, positions, blocks and heads, and whether its head is tied."""

    rows: int
    positions: int
    layers: int
    heads: int
    tied: bool


class CausalLM(nn.Module):
    """ids (B, T) → logits (B, T, V): `hidden_states` of ids, then `logits` of hidden states."""

    embedding_name: str  # full module names
    head_name: str
    virtual: "VirtualTokens | None"  # read before every sequence

    def __init__(self) -> None:
        super().__init__()
        self.register_module("virtual", None)

    @cached_property
    def supports_packing(self) -> bool:
        """Whether sequences packed end to end give what each gives alone. Tried once, on this model."""
        return _try_packing(self)

    @cached_property
    def supports_prefix(self) -> bool:
        """Whether attention takes a prefix's keys without a cache. Tried once, on this model."""
        from pipeline.models.virtual_tokens import try_prefix  # only prefix tuning asks

        return try_prefix(self)

    def set_virtual_tokens(self, virtual: "VirtualTokens") -> None:
        """Read these virtual tokens before every sequence from now on."""
        self.virtual = virtual
        self.__dict__.pop("supports_packing", None)  # cached without them

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence: the positions that no virtual token takes."""
        return self.shape.positions - (self.virtual.count if self.virtual is not None else 0)

    @property
    def shape(self) -> Shape:
        raise NotImplementedError

    @property
    def body(self) -> nn.Module:
        """The part that computes hidden states: embedding, blocks and last norm."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The Transformer's blocks, in order."""
        raise NotImplementedError

    def hidden_states(
        self, ids: Tensor, positions: Tensor | None = None, segments: Sequence[int] | None = None, cache: Any = None
    ) -> Tensor:
        """(B, T, D). `positions` (B, T) default to those after the cache.

        `segments`: lengths of the sequences packed end to end in one row (1, T); none attends to another.
        Virtual tokens are read before each sequence; `ids`, `positions` and the result do not contain them.
        """
        if self.virtual is None:
            return self.run_body(ids, positions, segments, cache)
        return self.virtual.read(self, ids, positions, segments, cache)

    def run_body(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """`hidden_states` without virtual tokens. `inputs`: ids (B, T), or embeddings (B, T, D).

        `prefix` adds keys and values before those of every sequence; not together with a cache.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., V)."""
        raise NotImplementedError

    @property
    def pack_up_to(self) -> int:
        """Pack equal-length sequences into one row up to this many tokens; above it, a row each is faster."""
        return 0

    def prepare_cpu_training(self) -> None:
        """Replace parts by faster ones that compute the same, in place."""

    def kept_attention_weights(self, lengths: Sequence[int]) -> int | None:  # noqa: ARG002
        """Attention weights per head that a training step keeps for one row of sequences; None if it keeps none."""
        return None

    def new_cache(self) -> Any:
        """An empty KV cache."""
        raise NotImplementedError

    def cache_length(self, cache: Any) -> int:
        """Number of tokens in the cache."""
        raise NotImplementedError

    def append_to_cache(self, cache: Any, block: int, keys: Tensor, values: Tensor) -> None:
        """Append keys and values (B, G, n, K) to the cache of one block."""
        raise NotImplementedError

    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of ids (B, T) in each block, (B, G, T, K) each; no sliding window drops any."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """config.json as transformers reads it."""
        raise NotImplementedError

    def set_rows(self, rows: int, tied: bool) -> None:
        """Update the config after embedding and head were resized or untied."""
        raise NotImplementedError

    def checkpoint_blocks(self, how: Checkpointing) -> None:
        """Gradient checkpointing of all blocks, of every second block, or of none."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors."""
        raise NotImplementedError

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        return self.logits(self.hidden_states(ids, positions, cache=cache))

    @property
    def embeddings(self) -> nn.Module:
        return self.get_submodule(self.embedding_name)

    @property
    def head(self) -> nn.Module:
        return self.get_submodule(self.head_name)

    @property
    def embedding_and_head(self) -> tuple[str, str]:
        """Last parts of the names of embedding and head, which adapters use."""
        return self.embedding_name.rsplit(".", 1)[-1], self.head_name.rsplit(".", 1)[-1]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights: an adapter may have another."""
        return next(p.dtype for name, p in self.blocks.named_parameters() if ".lora_" not in name)


class LowBitLinear(nn.Module):
    """A linear whose weight is stored in few bits: the interface of `quantization/quantized_linear.py`."""

    bias: nn.Parameter | None
    out_features: int
    in_features: int

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(O, I), dequantized in `dtype`."""
        raise NotImplementedError


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear, whose weight is (I, O)."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def checkpointed(how: Checkpointing, block: int) -> bool:
    """Whether block number `block` is recomputed in backward; the same rule as the calculator's `TrainingConfig`."""
    return how == "full" or (how == "selective" and block % 2 == 0)


@torch.no_grad()
def _try_packing(model: CausalLM) -> bool:
    """A sequence of three tokens and one of four, packed, against each alone."""
    first, second = torch.arange(3)[None] + 1, torch.arange(4)[None] + 2
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=model.device)
    try:
        packed = model.hidden_states(torch.cat((first, second), dim=1).to(model.device), positions, [3, 4])
        expected = [model.hidden_states(ids.to(model.device)) for ids in (first, second)]
    except Exception:  # whatever a body raises that takes no segments
        return False
    return bool(torch.allclose(packed.float(), torch.cat(expected, dim=1).float(), rtol=0.02, atol=0.02))


@torch.no_grad()
def packed_hidden_states(
    model: CausalLM, sequences: Sequence[Sequence[int]], max_tokens: int = 1024
) -> Iterator[Tensor]:
    """Hidden states (T, D) of each sequence of ids, in order.

    Up to `max_tokens` tokens are packed into one row, so that a large model's weights are read once for many short
    texts.
    """
    start = 0
    while start < len(sequences):
        stop, tokens = start + 1, len(sequences[start])
        while model.supports_packing and stop < len(sequences) and tokens + len(sequences[stop]) <= max_tokens:
            tokens += len(sequences[stop])
            stop += 1
        lengths = [len(sequence) for sequence in sequences[start:stop]]
        ids = torch.tensor([[id_ for sequence in sequences[start:stop] for id_ in sequence]], device=model.device)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
        hidden = model.hidden_states(ids, positions, lengths if len(lengths) > 1 else None)[0]
        yield from hidden.split(lengths)  # type: ignore[no-untyped-call]
        start = stop


@torch.no_grad()
def set_row_count(model: CausalLM, rows: int) -> None:
    """Resize embedding and head to `rows` rows, in place; old rows are copied bit for bit, new ones are zero."""
    tied = model.shape.tied
    for module, name in ((model.embeddings, "weight"), (model.head, "weight"), (model.head, "bias")):
        old = getattr(module, name, None)
        if old is not None and not (tied and (module, name) == (model.head, "weight")):
            new = old.new_zeros(rows, *old.shape[1:])
            new[: old.shape[0]].copy_(old)
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if tied:
        model.head.weight = model.embeddings.weight
    model.set_rows(rows, tied)
