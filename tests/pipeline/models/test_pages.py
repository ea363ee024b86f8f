"""Pages of keys and values: a sequence reads what it wrote, whatever it shares with others."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models import pages as pages_module
from pipeline.models.kernels import accelerator_attention
from pipeline.models.kernels.accelerator_attention import attend_on_accelerator
from pipeline.models.kernels.plain_attention import Rule
from pipeline.models.pages import PAGE, PackedCache, PagePool, Prefix, SequenceCache
from pipeline.project.probes import held
from tests.helpers.reference_flash import Calls, reference_flash

SIZE = 16


def numbers(ids: Sequence[int]) -> Tensor:
    """(n,): each depends on its token and on all before it, as a key does."""
    hashes = [zlib.crc32(bytes(ids[: n + 1])) % 10_000 for n in range(len(ids))]
    return torch.tensor(hashes, dtype=torch.float32)


def write(sequences: Sequence[SequenceCache], parts: Sequence[Sequence[int]], ids: Any) -> None:
    """Append the last tokens of each sequence's ids, in two blocks of two heads."""
    cache = PackedCache(sequences, [len(part) for part in parts])
    new = [numbers(row)[len(row) - len(part) :] for row, part in zip(ids, parts, strict=True)]
    keys = torch.cat(new)[None, None, :, None].expand(1, 2, -1, 4)
    for block in (0, 1):
        cache.append(block, keys + block, -keys)
    cache.advance()


def assert_holds(sequence: SequenceCache, ids: Sequence[int]) -> None:
    cache = PackedCache([sequence], [0])
    for block in (0, 1):
        empty = torch.zeros(1, 2, 0, 4)
        ((keys, values),) = cache.append(block, empty, empty).pairs()
        wanted = numbers(ids)[None, None, :, None].expand(1, 2, -1, 4)
        assert_close(keys, wanted + block, rtol=0, atol=0)
        assert_close(values, -wanted, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def copies_short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "LEAST_COPY", 3)


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=70)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), TOKENS),
        st.tuples(st.just("go on"), st.integers(0, 9), TOKENS),
        st.tuples(st.just("fail"), st.integers(0, 9), TOKENS),
        st.tuples(st.just("end"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("forget")),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(0, 12))
def test_a_sequence_has_its_own_keys_whatever_others_begin_share_and_end(
    steps: list[Any], limit: int
) -> None:
    pool, root = PagePool(SIZE, limit), Prefix()
    live: list[tuple[SequenceCache, list[int]]] = []
    for what, *rest in steps:
        if what == "begin":
            (ids,) = rest
            sequence = SequenceCache(pool, 10**6)
            known = sequence.begin(root, ids)
            assert known == sequence.length < len(ids)
            write([sequence], [ids[known:]], [ids])
            sequence.remember(root, ids)
            live.append((sequence, [*ids]))
        elif what == "forget":
            pool.forget()
        elif live:
            sequence, ids = live[rest[0] % len(live)]
            if what == "go on":
                ids += rest[1]
                write([sequence], [rest[1]], [ids])
            elif what == "fail":  # pages are taken, and the tokens not counted
                PackedCache([sequence], [len(rest[1])]).append(
                    0, *torch.full((2, 1, 2, len(rest[1]), 4), torch.nan)
                )
            else:
                if rest[1]:
                    sequence.remember(root, ids)
                sequence.close()
                live.remove((sequence, ids))
        for sequence, ids in live:
            assert_holds(sequence, ids)
    for sequence, _ in live:
        sequence.close()
    assert pool.used == 0
    pool.forget()
    assert pool.count == 0


def begun(pool: PagePool, root: Prefix, ids: list[int]) -> tuple[SequenceCache, int]:
    sequence = SequenceCache(pool, 10**6)
    known = sequence.begin(root, ids)
    write([sequence], [ids[known:]], [ids])
    sequence.remember(root, ids)
    return sequence, known


def test_equal_beginnings_share_whole_pages_and_copy_the_rest() -> None:
    pool, root = PagePool(SIZE), Prefix()
    common = [n % 7 for n in range(2 * SIZE + 5)]
    first, _ = begun(pool, root, [*common, 100])
    second, known = begun(pool, root, [*common, 101])
    assert known == len(common)
    assert first.pages[:2] == second.pages[:2] and first.pages[2] != second.pages[2]
    assert pool.used == 4
    other, known = begun(pool, Prefix(), [*common, 101])  # of another adapter
    assert known == 0 and not {*other.pages} & {*first.pages}
    # the last token of a prompt is read again, for its logits
    again, known = begun(pool, root, [*common, 100])
    assert known == len(common)
    assert_holds(again, [*common, 100])


def test_pages_of_ended_sequences_go_when_room_is_needed_and_the_oldest_first() -> None:
    pool, root = PagePool(SIZE, limit=4), Prefix()
    for token in range(3):
        begun(pool, root, [token] * SIZE + [9])[0].close()
    assert pool.used == 0 and pool.count == 4
    # three prompts of 2 pages each in 4 pages: the first has gone
    assert [begun(pool, root, [n] * SIZE + [8])[1] for n in (2, 1)] == [SIZE, SIZE]
    assert pool.count == 4


def test_pages_grow_and_do_not_move() -> None:
    pool = PagePool(SIZE)
    sequence, _ = begun(pool, Prefix(), [1] * SIZE)
    before = [*sequence.pages]
    others = [begun(pool, Prefix(), [n] * 3 * SIZE)[0] for n in range(2, 6)]
    assert sequence.pages == before and pool.used == 13
    assert_holds(sequence, [1] * SIZE)
    assert_holds(others[-1], [5] * 3 * SIZE)


class BytesMade(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of new tensors: of what is copied or computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, function: Any, _: Any, given: Any = (), named: Any = None) -> Any:
        out = function(*given, **(named or {}))
        leaves = tree_leaves((given, named))
        old = {x.untyped_storage()._cdata for x in leaves if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in old:
                self.total += x.nbytes
        return out


def test_a_token_of_16_long_sequences_copies_no_old_key_on_a_gpu() -> None:
    """On `meta`, which takes a GPU's path. All keys and values would be 268 MB for each block."""
    pool, lengths = PagePool(), [4095] * 16
    sequences = [SequenceCache(pool, 8192) for _ in lengths]

    def empty(heads: int, tokens: int) -> Tensor:
        return torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16, device="meta")

    cache = PackedCache(sequences, lengths)
    cache.append(0, empty(8, sum(lengths)), empty(8, sum(lengths)))
    cache.advance()
    q, k, v = empty(32, 16), empty(8, 16), empty(8, 16)
    with BytesMade() as made:
        cache = PackedCache(sequences, [1] * 16)
        pages = cache.append(0, k, v)
        out = attend_on_accelerator(q, k, v, [1] * 16, cache.spans, Rule(0.1), pages)
    assert out.shape == (1, 16, 32, 128)
    assert made.total < 4 * (q.nbytes + k.nbytes + v.nbytes)


paged = pytest.mark.skipif(not accelerator_attention._has_pages(), reason="an older torch")


@pytest.fixture
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Flash attention 2, or where a test says so 3, which reads pages on this CPU; its calls."""
    flash_3 = getattr(request, "param", 2) == 3
    monkeypatch.setattr(accelerator_attention, "take_flash_3", lambda _: flash_3)
    accelerator_attention._pages_agree.cache_clear()
    with reference_flash(flash_3=flash_3) as calls:
        yield calls
    accelerator_attention._pages_agree.cache_clear()


@paged
@pytest.mark.parametrize("flash", [2, 3], indirect=True)
@pytest.mark.parametrize("lengths", [[1, 3, 1], [1, 1, 1]], ids=["prompts", "tokens"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("sinks", [False, True])
def test_flash_attention_reads_pages_where_they_are(
    flash: Calls, lengths: list[int], window: int | None, sinks: bool
) -> None:
    pool, T = PagePool(), sum(lengths)
    sequences = [SequenceCache(pool, 3 * PAGE) for _ in lengths]
    generator = torch.Generator().manual_seed(0)
    past = [PAGE + 3, 20, 2 * PAGE - 1]

    def random(count: int, heads: int) -> Tensor:
        return torch.randn(1, heads, count, 8, generator=generator).bfloat16()

    PackedCache(sequences, past).append(0, random(sum(past), 2), random(sum(past), 2))
    for sequence, length in zip(sequences, past, strict=True):
        sequence.length = length
    q, cache = random(T, 4), PackedCache(sequences, lengths)
    pages = cache.append(0, random(T, 2), random(T, 2))
    sink = torch.linspace(-1, 1, 4) if sinks else None
    rule = Rule(8**-0.5, window, None, sink)
    k, v = (torch.cat(parts, 2) for parts in zip(*pages.pairs(), strict=True))
    wanted = accelerator_attention._blockwise(q, k, v, lengths, cache.spans, rule)
    with held() as found:
        actual = attend_on_accelerator(q, k, v, lengths, cache.spans, rule, pages)
    assert_close(actual, wanted, rtol=0.02, atol=0.02)
    # the probe's calls, and this one
    assert flash.paged == flash.forward == 3 and not found


@paged
def test_a_flash_attention_that_misreads_pages_is_not_taken(
    flash: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = accelerator_attention._flash_forward

    def misread(*given: Any, block_table: Tensor, **options: Any) -> Any:
        return right(*given, block_table=block_table * 0, **options)

    monkeypatch.setattr(accelerator_attention, "_flash_forward", misread)
    with held() as found:
        agrees = accelerator_attention._pages_agree(
            torch.device("cpu"), torch.bfloat16, False, False
        )
    assert not agrees and "off by" in found[0].said and flash.paged
