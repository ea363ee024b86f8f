"""Virtual tokens before every sequence, which prompt and prefix tuning train (the document's §7).

n virtual tokens take the positions 0 to n-1, a sequence's own tokens those from n on. G is the number of key and value
heads, L of blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import UserError


class Reader(Protocol):
    """The part of CausalLM that virtual tokens call; CausalLM imports this module, so not the other way round."""

    @property
    def embeddings(self) -> nn.Module: ...
    @property
    def blocks(self) -> nn.ModuleList: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def supports_prefix(self) -> bool: ...
    def new_cache(self) -> Any: ...
    def cache_length(self, cache: Any) -> int: ...
    def append_to_cache(self, cache: Any, block: int, keys: Tensor, values: Tensor) -> None: ...
    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]: ...
    def run_body(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
        prefix: Callable[[int, Tensor, Tensor, Sequence[int]], list[Tensor]] | None = None,
    ) -> Tensor: ...


class VirtualTokens(nn.Module):
    """n virtual tokens, in the layout in which PEFT stores them, `prompt_embeddings` (n, …)."""

    kind: ClassVar[str]

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(values)

    @property
    def count(self) -> int:
        """n."""
        return self.prompt_embeddings.shape[0]

    def read(
        self, model: Reader, ids: Tensor, positions: Tensor | None, segments: Sequence[int] | None, cache: Any
    ) -> Tensor:
        """`CausalLM.hidden_states`, (B, T, D), with the virtual tokens before each sequence; theirs are left out."""
        if cache is not None and model.cache_length(cache):  # it already holds the virtual tokens
            return model.run_body(ids, None if positions is None else positions + self.count, segments, cache)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.begin(model, ids, positions + self.count, segments, cache)

    def begin(
        self, model: Reader, ids: Tensor, positions: Tensor, segments: Sequence[int] | None, cache: Any
    ) -> Tensor:
        """The same with an empty cache or none; `positions` count the virtual tokens."""
        raise NotImplementedError


class PromptTokens(VirtualTokens):
    """Prompt tuning (Lester et al. 2021, §2): n embeddings (n, D) before those of the sequence."""

    kind = "prompt"

    def begin(
        self, model: Reader, ids: Tensor, positions: Tensor, segments: Sequence[int] | None, cache: Any
    ) -> Tensor:
        n, lengths = self.count, [ids.shape[1]] if segments is None else list(segments)
        x: Tensor = model.embeddings(ids)  # (B, T, D)
        first = torch.arange(n, device=ids.device)
        x = before_each(self.prompt_embeddings.to(x.dtype)[None], x, lengths)  # (B, T + n · sequences, D)
        all_positions = before_each(first[None], positions, lengths)
        longer = None if segments is None else [n + length for length in lengths]
        out = model.run_body(x, all_positions, longer, cache)
        sizes = [size for length in lengths for size in (n, length)]
        sequences = out.split(sizes, 1)[1::2]  # type: ignore[no-untyped-call]
        return sequences[0] if len(sequences) == 1 else torch.cat(sequences, 1)


class PrefixTokens(VirtualTokens):
    """Prefix tuning (Li & Liang 2021, §4.2): keys and values in every block, (n, L·2·G·K)."""

    kind = "prefix"

    def __init__(self, values: Tensor, layers: int, groups: int) -> None:
        super().__init__(values)
        self.layers, self.groups = layers, groups

    def of_block(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of block `number`, (1, G, n, K) each."""
        both = self.prompt_embeddings.view(self.count, self.layers, 2, self.groups, -1)[:, number]  # (n, 2, G, K)
        keys, values = both.permute(1, 2, 0, 3)
        return keys[None], values[None]

    def prepend(self, block: int, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Keys and values (B, G, T, K) of block number `block`, with the prefix's before each sequence of `lengths`."""
        before = (x.to(keys.dtype).transpose(1, 2) for x in self.of_block(block))  # (1, n, G, K)
        after = (x.transpose(1, 2) for x in (keys, values))  # (B, T, G, K)
        return [before_each(*pair, lengths).transpose(1, 2) for pair in zip(before, after, strict=True)]

    def begin(
        self, model: Reader, ids: Tensor, positions: Tensor, segments: Sequence[int] | None, cache: Any
    ) -> Tensor:
        if cache is None and model.supports_prefix:
            return model.run_body(ids, positions, segments, prefix=self.prepend)
        cache = model.new_cache() if cache is None else cache
        dtype = next(model.embeddings.parameters()).dtype
        for number in range(self.layers):
            keys, values = (x.to(dtype).expand(ids.shape[0], -1, -1, -1) for x in self.of_block(number))
            model.append_to_cache(cache, number, keys, values)
        return model.run_body(ids, positions, segments, cache)


def before_each(first: Tensor, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """`first` (1, n, …) before each of the sequences packed in x (B, T, …), whose `lengths` are given."""
    rows = first.expand(x.shape[0], *first.shape[1:])  # (B, n, …)
    return torch.cat([part for sequence in x.split_with_sizes(list(lengths), 1) for part in (rows, sequence)], 1)


@torch.no_grad()
def try_prefix(model: Reader) -> bool:
    """Whether two tokens after a prefix made of two others give what they give in one sequence of all four."""
    ids = (torch.arange(4)[None] + 1).to(model.device)
    try:
        expected = model.run_body(ids)[:, 2:]
        prefix = prefix_of(model.keys_and_values(ids[:, :2]), len(model.blocks))
        actual = model.run_body(ids[:, 2:], torch.tensor([[2, 3]], device=model.device), prefix=prefix.prepend)
    except Exception:  # whatever a body raises that takes no prefix
        return False
    return bool(torch.allclose(actual.float(), expected.float(), rtol=0.02, atol=0.02))


def prefix_of(read: Sequence[tuple[Tensor, Tensor]], layers: int) -> PrefixTokens:
    """The prefix made of the keys and values (1, G, n, K) of some tokens, one pair per block.

    Raises UserError for a model whose blocks do not all have such a pair.
    """
    shapes = {tuple(x.shape) for pair in read for x in pair}
    if len(read) != layers or len(shapes) != 1:
        raise UserError(
            "Prefix tuning needs keys and values of the same shape in every block, which this model does not have. "
            "Use prompt tuning: lora finetune prompt."
        )
    ((_, groups, n, _),) = shapes
    both = torch.stack([torch.stack(pair) for pair in read])  # (L, 2, 1, G, n, K)
    return PrefixTokens(both[:, :, 0].permute(3, 0, 1, 2, 4).reshape(n, -1).clone(), layers, groups)
