"""Virtual tokens before every sequence, which prompt and prefix tuning train.

n is the number of virtual tokens, G of key and value heads, L of blocks.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.base import CausalLM, VirtualTokens


class PromptTokens(VirtualTokens):
    """Prompt tuning (Lester et al. 2021, section 2): n embeddings (n, D) before a sequence's."""

    kind = "prompt"

    def begin(
        self,
        model: CausalLM,
        ids: Tensor,
        positions: Tensor,
        segments: Sequence[int] | None,
        cache: Any,
    ) -> Tensor:
        n = self.count
        lengths = [ids.shape[1]] if segments is None else list(segments)
        x: Tensor = model.embeddings(ids)  # (B, T, D)
        first = torch.arange(n, device=ids.device)
        # (B, T + n · sequences, D)
        x = before_each(self.prompt_embeddings.to(x.dtype)[None], x, lengths)
        all_positions = before_each(first[None], positions, lengths)
        longer = None if segments is None else [n + length for length in lengths]
        out = model.run_body(x, all_positions, longer, cache)
        # in turn: virtual tokens, sequence
        sizes = [*chain.from_iterable((n, length) for length in lengths)]
        sequences = out.split(sizes, 1)[1::2]  # type: ignore[no-untyped-call]  # (B, t, D) each
        return sequences[0] if len(sequences) == 1 else torch.cat(sequences, 1)


class PrefixTokens(VirtualTokens):
    """Prefix tuning (Li & Liang 2021, section 4.2): keys and values, (n, L·2·G·K)."""

    kind = "prefix"

    def __init__(self, values: Tensor, layers: int, groups: int) -> None:
        super().__init__(values)
        self.layers, self.groups = layers, groups

    def of_block(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of block `number`, (1, G, n, K) each."""
        # (n, 2, G, K)
        both = self.prompt_embeddings.view(self.count, self.layers, 2, self.groups, -1)[:, number]
        keys, values = both.permute(1, 2, 0, 3)
        return keys[None], values[None]

    def prepend(
        self, block: int, keys: Tensor, values: Tensor, lengths: Sequence[int]
    ) -> list[Tensor]:
        """Keys and values (B, G, T, K) of a block, with the prefix's before each sequence."""
        before = (x.to(keys.dtype).transpose(1, 2) for x in self.of_block(block))  # (1, n, G, K)
        after = (x.transpose(1, 2) for x in (keys, values))  # (B, T, G, K)
        pairs = zip(before, after, strict=True)
        return [before_each(*pair, lengths).transpose(1, 2) for pair in pairs]

    def begin(
        self,
        model: CausalLM,
        ids: Tensor,
        positions: Tensor,
        segments: Sequence[int] | None,
        cache: Any,
    ) -> Tensor:
        if cache is None and model.supports_prefix:
            return model.run_body(ids, positions, segments, prefix=self.prepend)
        # attention that takes no prefix takes a cache, whose first tokens then are the virtual ones
        cache = model.new_cache() if cache is None else cache
        dtype = next(model.embeddings.parameters()).dtype
        for number in range(self.layers):
            pair = (x.to(dtype).expand(len(ids), -1, -1, -1) for x in self.of_block(number))
            cache.update(*pair, number)
        return model.run_body(ids, positions, segments, cache)


def before_each(first: Tensor, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """x (B, T + n · sequences, …): `first` (1, n, …) before each sequence of `lengths` in x."""
    rows = first.expand(x.shape[0], *first.shape[1:])  # (B, n, …)
    sequences = x.split_with_sizes(list(lengths), 1)
    return torch.cat([*chain.from_iterable((rows, sequence) for sequence in sequences)], 1)


def prefix_of(read: Sequence[tuple[Tensor, Tensor]], layers: int) -> PrefixTokens:
    """The prefix made of the keys and values (1, G, n, K) of some tokens, one pair per block.

    Raises UserError for a model whose blocks do not all have such a pair.
    """
    shapes = {tuple(x.shape) for x in chain.from_iterable(read)}
    if len(read) != layers or len(shapes) != 1:
        raise UserError(
            "Prefix tuning needs keys and values of the same shape in every block, which this "
            "model does not have. Use prompt tuning: lora finetune prompt."
        )
    ((_, groups, n, _),) = shapes
    both = torch.stack([torch.stack(pair) for pair in read])  # (L, 2, 1, G, n, K)
    return PrefixTokens(both[:, :, 0].permute(3, 0, 1, 2, 4).reshape(n, -1).clone(), layers, groups)
