"""What every model here can do: MiniGPT is one kind, any causal language model that transformers opens the other.

Dimensions are those of `minigpt.py`. Module names are checkpoint names in both kinds, so that targets, adapters and
certificates need no table of renamings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.models.virtual_tokens import Prefix, VirtualTokens, prefix_of

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Shape:
    """What others must know of a model: rows of its embedding, positions, blocks, heads, whether the head is tied."""

    rows: int
    positions: int
    layers: int
    heads: int
    tied: bool


class CausalLM(nn.Module):
    """ids (B, T) → logits (B, T, V): `hidden` makes hidden states of ids, `logits` scores of hidden states."""

    embedding_name: str  # full names of the two ends
    head_name: str
    virtual: VirtualTokens | None  # read before every sequence

    def __init__(self) -> None:
        super().__init__()
        self.register_module("virtual", None)

    @cached_property
    def supports_packing(self) -> bool:
        """Whether sequences that lie end to end give what each gives alone: tried once, on this very model."""
        return _packs(self)

    @cached_property
    def supports_prefix(self) -> bool:
        """Whether attention joins a prefix to its keys without a cache: tried once, on this very model."""
        return _supports_prefix(self)

    def begin_with(self, virtual: VirtualTokens) -> None:
        """Read these virtual tokens before every sequence, from now on."""
        self.virtual = virtual
        self.__dict__.pop("supports_packing", None)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have: positions that no virtual token takes."""
        return self.shape.positions - (self.virtual.count if self.virtual is not None else 0)

    @property
    def shape(self) -> Shape:
        raise NotImplementedError

    @property
    def body(self) -> nn.Module:
        """The part whose forward makes hidden states: embedding, blocks and last norm."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The Transformer's blocks, in order."""
        raise NotImplementedError

    def hidden_states(
        self, ids: Tensor, positions: Tensor | None = None, segments: Sequence[int] | None = None, cache: Any = None
    ) -> Tensor:
        """(B, T, D). `positions` (B, T) default to those after the cache.

        `segments` are the lengths of sequences that lie end to end in one row (1, N), each to be read as if alone.
        Virtual tokens are read before each sequence and left out of `ids`, `positions` and what is returned.
        """
        if self.virtual is None:
            return self.plain(ids, positions, segments, cache)
        return self.virtual.read(self, ids, positions, segments, cache)

    def plain(
        self,
        read: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """The same without virtual tokens: `read` is ids (B, T), or embeddings (B, T, D) in their place.

        `prefix` gives keys and values that every sequence sees before its own; not together with a cache.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., V)."""
        raise NotImplementedError

    @property
    def pack_up_to(self) -> int:
        """Tokens up to which sequences of one length are quicker end to end in a row than in a row each."""
        return 0

    def new_cache(self) -> Any:
        """Keys and values of tokens seen so far: none yet."""
        raise NotImplementedError

    def cache_length(self, cache: Any) -> int:
        """Tokens in the cache."""
        raise NotImplementedError

    def append_to_cache(self, cache: Any, block: int, keys: Tensor, values: Tensor) -> None:
        """Add keys and values (B, G, n, K) to what a block has seen."""
        raise NotImplementedError

    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each block keeps of ids (B, T), (B, G, T, K) each, whatever it would forget later."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """config.json as transformers reads it."""
        raise NotImplementedError

    def set_rows(self, rows: int, tied: bool) -> None:
        """Say in the config what was done to embedding and head."""
        raise NotImplementedError

    def checkpoint_blocks(self, how: Checkpointing) -> None:
        """Blocks that keep their input alone and run again in backward: all, every second, or none."""
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
        """Last names of embedding and head, as adapters name them."""
        return self.embedding_name.rsplit(".", 1)[-1], self.head_name.rsplit(".", 1)[-1]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not adapted."""
        return next(p.dtype for name, p in self.blocks.named_parameters() if ".lora_" not in name)


def checkpointed(how: Checkpointing, block: int) -> bool:
    """Whether block number `block` runs again in backward; as the calculator's `Run.checkpointed`."""
    return how == "full" or (how == "selective" and block % 2 == 0)


@torch.no_grad()
def _packs(model: CausalLM) -> bool:
    first, second = torch.arange(3)[None] + 1, torch.arange(4)[None] + 2
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=model.device)
    try:
        packed = model.hidden_states(torch.cat((first, second), dim=1).to(model.device), positions, [3, 4])
        apart = [model.hidden_states(one.to(model.device)) for one in (first, second)]
    except Exception:  # whatever a body raises that takes no segments
        return False
    return bool(torch.allclose(packed.float(), torch.cat(apart, dim=1).float(), rtol=0.02, atol=0.02))


@torch.no_grad()
def _supports_prefix(model: CausalLM) -> bool:
    """Two tokens after a prefix that is the keys and values of two others, against all four."""
    ids = (torch.arange(4)[None] + 1).to(model.device)
    try:
        whole = model.plain(ids)[:, 2:]
        prefix = prefix_of(model.keys_and_values(ids[:, :2]), len(model.blocks))
        after = model.plain(ids[:, 2:], torch.tensor([[2, 3]], device=model.device), prefix=prefix.of_block)
    except Exception:  # whatever a body raises that takes no prefix
        return False
    return bool(torch.allclose(after.float(), whole.float(), rtol=0.02, atol=0.02))


@torch.no_grad()
def packed_hidden_states(model: CausalLM, sequences: Sequence[Sequence[int]], together: int = 1024) -> Iterator[Tensor]:
    """Hidden states (T, D) of each sequence of ids, in order.

    Up to `together` tokens are read end to end: a large model's weights are then read once for many short texts.
    """
    start = 0
    while start < len(sequences):
        stop, tokens = start + 1, len(sequences[start])
        while model.supports_packing and stop < len(sequences) and tokens + len(sequences[stop]) <= together:
            tokens += len(sequences[stop])
            stop += 1
        lengths = [len(one) for one in sequences[start:stop]]
        ids = torch.tensor([[id_ for one in sequences[start:stop] for id_ in one]], device=model.device)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
        hidden = model.hidden_states(ids, positions, lengths if len(lengths) > 1 else None)[0]
        yield from hidden.split(lengths)  # type: ignore[no-untyped-call]
        start = stop


@torch.no_grad()
def set_row_count(model: CausalLM, rows: int) -> None:
    """Give embedding and head `rows` rows, in place; the old ones are copied bit for bit, new ones are zero."""
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
