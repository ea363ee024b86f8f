"""Generation with a KV cache: greedy, or sampled with temperature, top-k and top-p."""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.device import available_memory, device_limits, to_device
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.kernels.decode import fast_decoding, reads_pages
from pipeline.models.pages import PAGE, PackedCache, PagePool, SequenceCache
from pipeline.project.probes import computes
from pipeline.project.process import world

if TYPE_CHECKING:
    from pipeline.data.tokenizers.word import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Temperature 0 is greedy; top_k 0 and top_p 1 keep every token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                "sampling needs temperature at least 0, top-k at least 0 and top-p above 0 up to "
                f"1, got {self.temperature}, {self.top_k} and {self.top_p}."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed}.")


Draw = tuple[Sampling, torch.Generator]  # the generator is on the CPU
GREEDY = Sampling()
# ids of two sequences, whose last tokens are read one at a time
PROBES = ((1, 2, 3, 4, 5), (2, 3, 4))
NOT_FINITE = (
    "The model's outputs are not finite: its weights or its adapter's scale are too large. "
    "Train it again with a lower learning_rate."
)
# at lower temperatures the division overflows, and the likeliest token is sampled anyway
COLDEST = 1e-6


class SampledToken(NamedTuple):
    """A sampled token, and its probability under the model before temperature and cuts."""

    id: int
    probability: float


def encode_prompt(name: str, model: CausalLM, tokenizer: "Tokenizer", text: str) -> tuple[int, ...]:
    """The prompt's ids. Raises UserError like `encode_text`, or if they are too many."""
    ids = encode_text(name, tokenizer, text)
    if len(ids) > model.max_length:
        raise UserError(f"The prompt has {len(ids)} tokens; {name} takes {model.max_length}.")
    return ids


def encode_text(name: str, tokenizer: "Tokenizer", text: str) -> tuple[int, ...]:
    """The ids of a prompt of any length. Raises UserError if it is empty or has an unknown word."""
    unknown, ids = tokenizer.unknown_words(text), tokenizer.encode(text)
    if not ids:
        raise UserError("The prompt is empty. Give at least one word.")
    if unknown:
        raise UserError(
            f"{name} does not know: {', '.join(unknown)}. It is a word-level model: use words from "
            "its training data, or add them with expand_vocab."
        )
    return ids


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    ends: Container[int],
    limit: int,
    sampling: Sampling = GREEDY,
    packed: bool = True,
) -> Iterator[int]:
    """Yields up to `limit` token ids after `prompt`, and stops before a token of `ends`."""
    tokens = stream(model, prompt, ends, limit, sampling, packed)
    return (token.id for token in tokens if token.id not in ends)


@torch.no_grad()
def stream(
    model: CausalLM,
    prompt: Sequence[int],
    ends: Container[int],
    limit: int,
    sampling: Sampling = GREEDY,
    packed: bool = True,
) -> Iterator[SampledToken]:
    """Yields up to `limit` tokens after `prompt`, each as soon as it is sampled.

    A token of `ends` is the last.

    `packed`: whether a copy of the weights in a faster layout may be made and kept
    (`fast_decoding`). Raises UserError if the logits are not finite.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    new = [*prompt]  # first the prompt, then one token per step
    with fast_decoding(model) if packed else nullcontext():
        read = _reader(model)
        for _ in range(min(limit, model.max_length - len(prompt))):
            logits = read(new)  # (V,)
            ((token, logprob),) = next_tokens(logits[None], [(sampling, generator)])
            sampled = SampledToken(finite_id(token), math.exp(logprob))
            yield sampled
            if sampled.id in ends:
                return
            new = [sampled.id]


def _reader(model: CausalLM) -> Callable[[list[int]], Tensor]:
    """Reads the next tokens of one sequence: logits (V,) after the last."""
    if model.virtual is None and _has_fast_pages(model):
        sequence = SequenceCache(PagePool(), model.max_length)
        return lambda ids: read_side_by_side(model, [sequence], [ids])[0]
    cache = model.new_cache()

    def read(ids: list[int]) -> Tensor:
        new = to_device(torch.tensor([ids]), model.device)  # (1, T)
        return model.logits(model.hidden_states(new, cache=cache)[0, -1])

    return read


def _has_fast_pages(model: CausalLM) -> bool:
    """Whether a PackedCache is faster than transformers' cache, which copies all keys per token."""
    if uses_cpu_kernels(model.device):
        return reads_pages(model)
    if model not in _side_by_side:
        _side_by_side[model] = _reads_side_by_side(model)
    return _side_by_side[model]


# by model on an accelerator: whether it reads sequences from a PackedCache
_side_by_side: WeakKeyDictionary[CausalLM, bool] = WeakKeyDictionary()


def generate_all(
    model: CausalLM, prompts: Sequence[Sequence[int]], ends: Container[int], limits: Sequence[int]
) -> list[list[int]]:
    """Greedy continuations of many prompts, as `generate` gives them with packed=False.

    A token of each comes from one forward where the model reads sequences side by side. Raises
    UserError if the logits are not finite.
    """
    if not model.mixes_lengths or not _reads_side_by_side(model):
        pairs = zip(prompts, limits, strict=True)
        return [list(generate(model, prompt, ends, limit, packed=False)) for prompt, limit in pairs]
    answers: list[list[int]] = []
    start, room = 0, PAGE * device_limits(model.device).sequences
    # ranks run the same forwards of a sharded model, whatever memory each has
    if world().world_size == 1:
        room = min(room, cache_room(model))
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    for stop in range(1, len(lengths)):
        if cached_tokens(model, lengths[start : stop + 1]) > room:
            answers += _generate_group(model, prompts[start:stop], ends, limits[start:stop])
            start = stop
    return answers + _generate_group(model, prompts[start:], ends, limits[start:])


@torch.no_grad()
def _generate_group(
    model: CausalLM, prompts: Sequence[Sequence[int]], ends: Container[int], limits: Sequence[int]
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    pairs = zip(prompts, limits, strict=True)
    rooms = [min(limit, model.max_length - len(prompt)) for prompt, limit in pairs]
    capacities = [len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)]
    # a page for each sequence, and no more
    pool = PagePool(cached_tokens(model, [max(capacities, default=0)]), len(capacities))
    caches = [SequenceCache(pool, capacity) for capacity in capacities]
    likely = dict[int, NextToken]()
    for n, prompt in enumerate(prompts):
        # prompts one after the other: together they may be longer than any batch of the training
        if rooms[n] > 0:
            (likely[n],) = next_tokens(read_side_by_side(model, [caches[n]], [prompt]))
    while likely:
        running = dict[int, int]()
        for n, row in likely.items():
            token = finite_id(row.id)
            if token in ends:
                continue
            answers[n].append(token)
            if len(answers[n]) < rooms[n]:
                running[n] = token
        if not running:
            break
        tokens = [[token] for token in running.values()]
        rows = next_tokens(read_side_by_side(model, [caches[n] for n in running], tokens))
        likely = dict(zip(running, rows, strict=True))
    return answers


def cached_tokens(model: CausalLM, lengths: Sequence[int]) -> int:
    """Tokens that sequences take in a cache, on an accelerator all as many pages as the longest."""
    if uses_cpu_kernels(model.device):
        return sum(lengths)
    return len(lengths) * -(-max(lengths) // PAGE) * PAGE


def read_side_by_side(
    model: CausalLM, caches: Sequence[SequenceCache], parts: Sequence[Sequence[int]]
) -> Tensor:
    """(N, V): the logits after each sequence's new tokens, which the caches get."""
    cache = PackedCache(caches, [len(part) for part in parts])
    logits = model.logits(last_states(model, cache, parts))
    cache.advance()
    return logits


def last_states(model: CausalLM, cache: PackedCache, parts: Sequence[Sequence[int]]) -> Tensor:
    """(N, D): the hidden states of the last of each sequence's new tokens, packed into one row."""
    ids, positions = list[int](), list[int]()
    for part, past, span in zip(parts, cache.past, cache.spans, strict=True):
        ids += part
        positions += range(past, span)
    last = [stop - 1 for stop in accumulate(cache.lengths)]
    # one copy for all
    pages = cache.indices()
    table = to_device(torch.tensor([*ids, *positions, *last, *pages]), model.device)
    sizes = [len(ids), len(ids), len(last), len(pages)]
    ids_, positions_, last_, pages_ = table.split_with_sizes(sizes)
    cache.put(pages_)
    return model.hidden_states(ids_[None], positions_[None], cache.lengths, cache)[0][last_]


def _reads_side_by_side(model: CausalLM) -> bool:
    return model.takes_packed_cache and agrees(
        model, lambda caches, parts: read_side_by_side(model, caches, parts)
    )


@torch.no_grad()
def agrees(
    alone: CausalLM, read: Callable[[Sequence[SequenceCache], Sequence[Sequence[int]]], Tensor]
) -> bool:
    """Whether `read` gives side by side the logits that `alone` gives for one sequence."""
    if alone.virtual is not None:  # virtual tokens cannot be read into a PackedCache
        return False
    first, second = ([id_ % alone.shape.rows for id_ in probe] for probe in PROBES)

    def side_by_side() -> Tensor:
        pool = PagePool(cached_tokens(alone, [len(first) + len(second)]))
        caches = [SequenceCache(pool, len(ids)) for ids in (first, second)]
        all_but_last = read(caches, [first[:-1], second[:-1]])
        return torch.stack([all_but_last[0], read(caches, [first[-1:], second[-1:]])[0]])

    def last_logits(ids: Sequence[int], end: int | None = None) -> Tensor:
        logits: Tensor = alone(torch.tensor([ids], device=alone.device))  # (1, T, V)
        return logits[0, :end][-2:]

    return computes(
        "answers side by side",
        "one is generated at a time",
        side_by_side,
        right=lambda: last_logits(first),
        # a batch of two may take the same kernels as one; more tokens do not
        again=lambda: last_logits((first + second * 8)[: alone.max_length], len(first)),
        wrong=lambda: last_logits(second + first),
    )


def cache_room(model: CausalLM) -> int:
    """Tokens whose keys and values fit into half of the free memory.

    The rest is for activations, logits and adapters.
    """
    return available_memory(model.device) // 2 // max(bytes_per_token(model), 1)


@torch.no_grad()
def bytes_per_token(model: CausalLM) -> int:
    """Bytes of a token's keys and values: measured, as families keep different things."""
    cache, sizes = model.new_cache(), list[int]()
    # the first token comes with virtual tokens, and with states that do not grow
    for _ in range(2):
        model.hidden_states(torch.zeros(1, 1, dtype=torch.int64, device=model.device), cache=cache)
        is_ours = isinstance(cache.layers, dict)
        layers = cache.layers.values() if is_ours else map(vars, cache.layers)
        leaves = tree_leaves([*layers])
        sizes.append(sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)))
    return sizes[1] - sizes[0]


class NextToken(NamedTuple):
    """The next token of a row of logits, -1 if they are not finite.

    Its log-probability is that before temperature and cuts.
    """

    id: int
    logprob: float


def next_tokens(logits: Tensor, draws: Sequence[Draw] = ()) -> list[NextToken]:
    """Of each row (N, V), drawn; without `draws` the likeliest.

    They are found on the device, and read once.
    """
    logits = logits.float()
    least, most = logits.aminmax(dim=-1)  # a fifth of the time of isfinite on all of them
    is_finite = least.isfinite() & most.isfinite()
    ids = draw(logits, draws)  # a token among NaNs too
    logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
    # in fp32, which holds every id below 2^24: not every device has fp64
    table = torch.stack([torch.where(is_finite, ids, -1).float(), logprobs]).cpu()
    return [NextToken(int(id_), logprob) for id_, logprob in table.T.tolist()]


def finite_id(id_: int) -> int:
    """Returns the id of a `NextToken`. Raises UserError for that of logits that are not finite."""
    if id_ < 0:
        raise UserError(NOT_FINITE)
    return id_


def finite(numbers: Tensor) -> Tensor:
    """Returns `numbers`. Raises UserError if they are not finite."""
    # a fifth of the time of isfinite on all of them
    if not torch.stack(numbers.aminmax()).isfinite().all():
        raise UserError(NOT_FINITE)
    return numbers


def draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Ids (N,) of rows of logits (N, V), on their device.

    One number of a row's generator decides: it is where the sum of probabilities, in the order of
    ids, exceeds it. So a seed draws the same token everywhere, but for rounding.
    """
    ids = logits.argmax(-1)
    warm = [n for n, (sampling, _) in enumerate(draws) if sampling.temperature >= COLDEST]
    if not warm:
        return ids
    samplings = [draws[n][0] for n in warm]
    numbers = torch.cat([torch.rand(1, generator=draws[n][1]) for n in warm])
    rows = to_device(torch.tensor(warm), logits.device)
    sums = _prefix_sums(distributions(logits[rows], samplings))
    sought = to_device(numbers, logits.device)[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, sought, right=True)[:, 0]
    return ids.index_copy(0, rows, found.clamp_max(logits.shape[1] - 1))  # of NaNs


def _prefix_sums(probabilities: Tensor) -> Tensor:
    """`cumsum` of each row (N, V), the same each time."""
    if probabilities.device.type == "cpu":
        return probabilities.cumsum(1)
    # CUDA adds up a lone row of floats in an order that varies, which whole numbers do not show
    return (probabilities * 2.0**40).long().cumsum(1) / 2.0**40


def distributions(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """`distribution` of each row (N, V).

    An accelerator sorts whole vocabularies: to ask it how many candidates there are takes longer.
    """
    if logits.device.type == "cpu":
        pairs = zip(logits, samplings, strict=True)
        return torch.stack([distribution(row, sampling) for row, sampling in pairs])
    return _sorted_distributions(logits, samplings)


def _sorted_distributions(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    V = logits.shape[1]
    rows = [(sampling.temperature, sampling.top_k or V, sampling.top_p) for sampling in samplings]
    temperature, k, p = to_device(torch.tensor(rows), logits.device).T[..., None]  # (N, 1) each
    logits = logits / temperature
    if not any(sampling.top_k or sampling.top_p < 1 for sampling in samplings):
        return logits.softmax(1)
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    ranks = torch.arange(V, device=logits.device)
    cut = ordered.masked_fill(ranks >= k, -torch.inf).softmax(1)
    before = _prefix_sums(cut) - cut  # mass of the likelier tokens
    cut = cut.masked_fill((before >= p) & (ranks > 0), 0)
    return torch.zeros_like(logits).scatter(1, order, cut / cut.sum(1, keepdim=True))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (V,) after temperature, then top-k, then top-p (Holtzman et al. 2020).

    Only tokens that can pass the cuts are sorted: sorting a vocabulary of 49,152 takes longer than
    a token of a batch.
    """
    logits, k, p = logits / sampling.temperature, min(sampling.top_k, len(logits)), sampling.top_p
    probabilities = logits.softmax(0)
    if not k and p == 1:
        return probabilities
    if k:
        candidates = logits >= logits.topk(k).values[-1]
    else:
        # tokens below the mean of 1 - p over all have less than 1 - p together; half of it, as sums
        # are rounded
        candidates = probabilities >= min((1 - p) / 2 / len(logits), float(probabilities.max()))
    ids = candidates.nonzero()[:, 0]  # (n,)
    # stable: of equal logits the lower id is the likelier one everywhere, so that a seed gives the
    # same text
    ordered, order = logits[ids].sort(descending=True, stable=True)
    ids = ids[order]
    if k:
        ordered, ids = ordered[:k], ids[:k]
    cut = ordered.softmax(0) if k else probabilities[ids]
    before = cut.cumsum(0) - cut  # mass of the likelier tokens
    cut[1:][before[1:] >= p] = 0  # the likeliest stays, however small top_p is
    return torch.zeros_like(logits).scatter(0, ids, cut / cut.sum())
