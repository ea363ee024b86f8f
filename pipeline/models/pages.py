"""The keys and values of sequences, in pages that do not move: a KV cache for many at once.

A pool holds the pages of all sequences of a model. A sequence has a table of pages, and what it
appends is written in place. Sequences that begin with the same tokens share pages (Kwon et al.
2023, "Efficient memory management for large language model serving with PagedAttention").
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.device import to_device

# tokens of a page: torch's flash attention reads pages of a multiple of it
PAGE = 256
# tokens from which on it pays to copy the beginning of another sequence's page
LEAST_COPY = 32
LANES = 16


@dataclass(eq=False)
class Prefix:
    """Tokens whose keys and values a page has, after those of `parent` and its parents."""

    page: int = -1
    tokens: tuple[int, ...] = ()
    parent: "Prefix | None" = None
    longer: list["Prefix"] = field(default_factory=list)

    def best(self, ids: Sequence[int]) -> tuple["Prefix", int]:
        """The longer prefix that has most of the next `ids`, and how many it has."""
        counts = [_common(prefix.tokens, ids) for prefix in self.longer]
        most = max(counts, default=0)
        return (self.longer[counts.index(most)], most) if most else (self, 0)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


class PagePool:
    """Pages of `size` tokens or a few more, (pages, size, G, K) of keys and of values in every block.

    There is memory for twice as many when none is left. The pages of ended sequences stay as a
    cache of prefixes; from `limit` pages on, those not used for longest are taken first.
    """

    def __init__(self, size: int = PAGE, limit: int = 0) -> None:
        # kernels read keys by so many
        self.size, self.limit = -(-size // LANES) * LANES, limit
        self.count = 0  # of pages that there is memory for
        self.version = 0  # another number when the tensors are others
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self._free = set[int]()
        self._users = Counter[int]()  # sequences that read a page
        # pages with the keys and values of a prefix, the least recently used first
        self._prefixes = OrderedDict[int, Prefix]()

    @property
    def used(self) -> int:
        """Pages that sequences read."""
        return len(self._users)

    def take(self, after: int) -> int:
        """A page with one user: the one after page `after` if it is free."""
        if not self._free:
            self._make_room()
        page = after + 1 if after + 1 in self._free else min(self._free)
        self._free.remove(page)
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """Count one more user."""
        self._users[page] += 1

    def give_back(self, page: int) -> None:
        """Count one user less. A page without users stays if it has a prefix."""
        self._users[page] -= 1
        if not self._users[page]:
            del self._users[page]
            if page not in self._prefixes:
                self._free.add(page)

    def forget(self) -> None:
        """Drop the prefixes that no sequence reads, and with the last sequence the memory."""
        for page in [*self._prefixes]:
            self._drop(page)
        if not self._users:
            self._blocks, self._free, self.count = {}, set(), 0
            self.version += 1

    def remember(self, parent: Prefix, page: int, tokens: Sequence[int]) -> Prefix:
        """The prefix of a page's tokens after those of `parent`: this page's, or one like it."""
        prefix = self._prefixes.get(page)
        if prefix is None or prefix.parent is not parent:
            alike = (other for other in parent.longer if other.tokens == tuple(tokens))
            other = next(alike, None)
            if other is not None:
                return other
            # of a parent that was dropped
            self._detach(prefix)
            prefix = self._prefixes[page] = Prefix(page, parent=parent)
            parent.longer.append(prefix)
        if len(tokens) > len(prefix.tokens):
            prefix.tokens = (*tokens,)
        return prefix

    def touch(self, prefix: Prefix) -> None:
        """Note that it and what it follows were used now, what it follows last of all."""
        while prefix.parent is not None:
            if prefix.page in self._prefixes:
                self._prefixes.move_to_end(prefix.page)
            prefix = prefix.parent

    def block(self, number: int, like: Tensor, keys: int, values: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, (pages, size, G, K) for `like` (…, G, ·) and their sizes K."""
        old = self._blocks.get(number)
        if old is not None and len(old[0]) == self.count:
            return old
        sizes = (keys, values)
        # zeros: a kernel may multiply what it masks
        new = [like.new_zeros(self.count, self.size, like.shape[-2], size) for size in sizes]
        for grown, before in zip(new, old or (), strict=False):
            grown[: len(before)] = before
        self._blocks[number] = new[0], new[1]
        return self._blocks[number]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of a page into another, in every block."""
        for number, (keys, values) in [*self._blocks.items()]:
            # with the memory of a page that was taken just now
            for part in self.block(number, keys, keys.shape[3], values.shape[3]):
                part[target, :tokens] = part[source, :tokens]

    def _make_room(self) -> None:
        if self.count >= self.limit:
            for page in [*self._prefixes]:
                if self._drop(page):
                    return
        grown = max(1, 2 * self.count)
        if self.count < self.limit:
            grown = min(grown, self.limit)
        self._free.update(range(self.count, grown))
        self.count = grown
        self.version += 1

    def _drop(self, page: int) -> bool:
        """Forget a page's prefix if no sequence reads it. What follows it is not found any more."""
        if page in self._users:
            return False
        self._detach(self._prefixes.pop(page))
        self._free.add(page)
        return True

    def _detach(self, prefix: Prefix | None) -> None:
        if prefix is not None and prefix.parent is not None:
            prefix.parent.longer.remove(prefix)


class SequenceCache:
    """Keys and values of one sequence of at most `capacity` tokens: a table of a pool's pages."""

    def __init__(self, pool: PagePool, capacity: int) -> None:
        self.pool, self.capacity, self.length = pool, capacity, 0
        self.pages = list[int]()

    def reserve(self, length: int) -> None:
        """Take the pages of `length` tokens."""
        while len(self.pages) * self.pool.size < length:
            self.pages.append(self.pool.take(self.pages[-1] if self.pages else -1))

    def begin(self, root: Prefix, ids: Sequence[int]) -> int:
        """How many of the first of `ids` need not be read: an earlier sequence's are taken over.

        Whole pages are shared; of a page in which the two part, the common beginning is copied. At
        least the last token is to be read, for its logits.
        """
        pool, node = self.pool, root
        while True:
            rest = ids[self.length : -1]
            prefix, count = node.best(rest[: pool.size])
            if count < pool.size:
                break
            pool.share(prefix.page)
            self.pages.append(prefix.page)
            self.length += count
            node = prefix
        if count >= LEAST_COPY:
            pool.share(prefix.page)  # it must not be the one that is taken
            self.reserve(self.length + count)
            pool.copy(prefix.page, self.pages[-1], count)
            pool.give_back(prefix.page)
            self.length += count
            node = prefix
        pool.touch(node)
        return self.length

    def remember(self, root: Prefix, ids: Sequence[int]) -> None:
        """Let other sequences take over what this one has read, `ids`."""
        node, size = root, self.pool.size
        for page, start in zip(self.pages, range(0, self.length, size), strict=False):
            node = self.pool.remember(node, page, ids[start : min(start + size, self.length)])
            if len(node.tokens) < size:
                break
        self.pool.touch(node)

    def close(self) -> None:
        """Give the pages back."""
        for page in self.pages:
            self.pool.give_back(page)
        self.pages = []


class BlockPages(NamedTuple):
    """What the sequences of a cache have in one block."""

    cache: "PackedCache"
    keys: Tensor  # (pages, size, G, K)
    values: Tensor

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, G, S, K) of each sequence: views where its pages stand in a row."""
        table = self.cache.tables_on(self.keys.device).pages
        pairs = list[tuple[Tensor, Tensor]]()
        for n, (sequence, span) in enumerate(
            zip(self.cache.sequences, self.cache.spans, strict=True)
        ):
            first, count = sequence.pages[0], len(sequence.pages)
            where: slice | Tensor = table[n, :count]
            if sequence.pages == [*range(first, first + count)]:
                where = slice(first, first + count)
            # (count, size, G, K) each
            keys, values = (part[where].flatten(0, 1)[:span] for part in (self.keys, self.values))
            pairs.append((keys.transpose(0, 1)[None], values.transpose(0, 1)[None]))
        return pairs


class Tables(NamedTuple):
    """What flash attention reads of a cache on the device, in int32."""

    q_starts: Tensor  # (N + 1,): where each sequence's new tokens begin, and the end of the last
    k_starts: Tensor  # (N + 1,): the same of all its tokens, were they in a row
    spans: Tensor  # (N,): its tokens
    pages: Tensor  # (N, n): its pages


class PackedCache:
    """The caches of sequences whose next tokens, of `lengths`, are packed end to end in one row.

    `hidden_states(cache=…)` then needs `positions` and `segments`. Every sequence attends to its
    own keys only. All are of one pool.
    """

    def __init__(self, sequences: Sequence[SequenceCache], lengths: Sequence[int]) -> None:
        self.sequences, self.lengths = sequences, lengths
        self.pool = sequences[0].pool
        self.past = [sequence.length for sequence in sequences]
        # of each sequence, the new tokens included
        self.spans = [past + length for past, length in zip(self.past, lengths, strict=True)]
        # where in the pages, one after the other, the new tokens are, (T,)
        self._slots: Tensor | None = None
        self._tables: Tables | None = None
        for sequence, span in zip(sequences, self.spans, strict=True):
            sequence.reserve(span)

    def append(self, block: int, keys: Tensor, values: Tensor) -> BlockPages:
        """Write the new keys and values (1, G, T, K) of all sequences into their pages."""
        self.tables_on(keys.device)
        rows = [part[0].transpose(0, 1) for part in (keys, values)]  # (T, G, K) each
        pages = self.pool.block(block, rows[0], keys.shape[3], values.shape[3])
        for part, new in zip(pages, rows, strict=True):
            part.flatten(0, 1)[self._slots] = new
        return BlockPages(self, *pages)

    def indices(self) -> list[int]:
        """What attention needs on the device, for `put`."""
        size, numbers = self.pool.size, list[int]()
        for sequence, past, span in zip(self.sequences, self.past, self.spans, strict=True):
            tokens = range(past, span)
            numbers += [sequence.pages[t // size] * size + t % size for t in tokens]
        for counts in (self.lengths, self.spans):
            numbers += accumulate(counts, initial=0)
        numbers += self.spans
        return [*numbers, *chain.from_iterable(self.tables)]

    def put(self, indices: Tensor) -> None:
        """Take over `indices` on the device, so that a caller sends all that it has at once."""
        N, new = len(self.spans), sum(self.lengths)
        self._slots, rest = indices.tensor_split([new])
        sizes = [N + 1, N + 1, N, N * len(self.tables[0])]
        q_starts, k_starts, spans, pages = rest.int().split_with_sizes(sizes)
        self._tables = Tables(q_starts, k_starts, spans, pages.view(N, -1))

    @cached_property
    def tables(self) -> list[list[int]]:
        """Each sequence's pages, then 0: all as long as the longest."""
        longest = max(len(sequence.pages) for sequence in self.sequences)
        return [[*s.pages, *[0] * (longest - len(s.pages))] for s in self.sequences]

    def tables_on(self, device: torch.device) -> Tables:
        """The tables, from now on on `device`."""
        if self._tables is None:
            self.put(to_device(torch.tensor(self.indices()), device))
        assert self._tables is not None
        return self._tables

    def advance(self) -> None:
        """Count the new tokens, once every block has them.

        A forward that raised then leaves the caches as they were.
        """
        for sequence, span in zip(self.sequences, self.spans, strict=True):
            sequence.length = span
