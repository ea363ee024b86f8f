"""Attention of packed rows against one sequence at a time and against transformers' own eager
attention.
"""

import copy
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from pipeline.models.kernels import accelerator_attention, packed_attention, short_attention
from pipeline.models.kernels.accelerator_attention import _blockwise, seen_keys
from pipeline.models.kernels.packed_attention import attend, register
from pipeline.models.kernels.plain_attention import Rule

MODULE = nn.Module()
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral, window of 5": MistralConfig(**SMALL, sliding_window=5),
    "gemma2, window and caps": Gemma2Config(**SMALL, sliding_window=4, query_pre_attn_scalar=8),
    "gpt-oss, window and sinks": GptOssConfig(
        **SMALL, sliding_window=4, num_local_experts=2, num_experts_per_tok=2
    ),
    "deepseek, values of another size": DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4, "head_dim": 4},
        **{
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        first_k_dense_replace=2,
    ),
}
LENGTHS = [7, 1, 12, 5]
Three = tuple[Tensor, Tensor, Tensor]


def tensors(
    heads: int, groups: int, queries: int, keys: int, size: int = 8, rows: int = 1
) -> Three:
    torch.manual_seed(queries * 31 + keys)
    k, v = (torch.randn(rows, groups, keys, size).requires_grad_() for _ in range(2))
    return torch.randn(rows, heads, queries, size).requires_grad_(), k, v


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(B, T, H, K), query by query and head by head."""
    B, H, T, K = q.shape
    S, shared = k.shape[2], H // k.shape[1]
    out = q.new_zeros(B, T, H, K)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        stop = S - T + t + 1
        start = 0 if window is None else max(0, stop - window)
        scores = k[b, h // shared, start:stop] @ q[b, h, t] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        extra = scores.new_zeros(0) if sinks is None else sinks[h : h + 1]
        weights = torch.cat([scores, extra]).softmax(0)[: stop - start]
        out[b, t, h] = weights @ v[b, h // shared, start:stop]
    return out


def gradients(out: Tensor, inputs: Three) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.autograd.grad(out, inputs, torch.randn_like(out))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    window=st.none() | st.integers(1, 10),
    softcap=st.none() | st.just(2.0),
    sinks=st.booleans(),
    scaling=st.none() | st.just(0.7),
)
@pytest.mark.slow
def test_a_packed_row_is_each_sequence_alone(
    lengths: list[int],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    sinks: bool,
    scaling: float | None,
) -> None:
    H, G = heads
    inputs = tensors(H, G, sum(lengths), sum(lengths))
    s_aux = torch.linspace(-1, 1, H) if sinks else None
    special: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "s_aux": s_aux}
    found, _ = attend(MODULE, *inputs, None, scaling=scaling, segments=lengths, **special)
    scale = 8**-0.5 if scaling is None else scaling
    q, k, v = (x.split_with_sizes(lengths, 2) for x in inputs)
    alone = [by_hand(*part, scale, window, softcap, s_aux) for part in zip(q, k, v, strict=True)]
    wanted = torch.cat(alone, 1)
    assert found.is_contiguous()
    assert_close(found, wanted)
    assert_close(gradients(found, inputs), gradients(wanted, inputs))


@given(
    queries=st.integers(1, 6),
    cached=st.integers(0, 6),
    heads=st.sampled_from([(4, 2), (3, 3)]),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.just(1.5),
)
@pytest.mark.slow
def test_queries_behind_a_cache_stand_at_its_end(
    queries: int, cached: int, heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    inputs = tensors(*heads, queries, queries + cached, rows=2)
    found, _ = attend(MODULE, *inputs, None, sliding_window=window, softcap=softcap)
    wanted = by_hand(*inputs, 8**-0.5, window, softcap, None)
    assert_close(found, wanted)
    assert_close(gradients(found, inputs), gradients(wanted, inputs))
    with torch.no_grad():
        assert_close(
            attend(MODULE, *inputs, None, sliding_window=window, softcap=softcap)[0],
            wanted.detach(),
        )


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_every_token_is_a_query_once_and_has_its_whole_past_in_its_block(
    lengths: list[int],
) -> None:
    begins = [
        stop - length
        for length, stop in zip(lengths, accumulate(lengths), strict=True)
        for _ in range(length)
    ]
    queries = list[int]()
    for block in short_attention.blocks(lengths):
        assert (
            block.stop - block.start <= short_attention.BLOCK
            and sum(block.lengths) == block.stop - block.first
        )
        queries += range(block.start, block.stop)
        assert block.first == begins[block.start], "and no more than that of its first token"
    assert queries == list(range(sum(lengths)))


@pytest.mark.parametrize("longest", [16, 600])
def test_blocks_of_queries_and_fused_attention_agree(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On either side of what counts as short, with several blocks a sequence and several sequences
    a block.
    """
    lengths = [2, longest, 3, 2, longest // 2, 1, 1, 1]
    inputs = tensors(4, 2, sum(lengths), sum(lengths))
    monkeypatch.setattr(short_attention, "BLOCK", 5)
    monkeypatch.setattr(packed_attention, "LONGEST", 600)
    short, _ = attend(MODULE, *inputs, None, segments=lengths)
    monkeypatch.setattr(packed_attention, "LONGEST", 0)
    fused, _ = attend(MODULE, *inputs, None, segments=lengths)
    assert_close(short, fused, atol=1e-4, rtol=1e-4)
    assert_close(gradients(short, inputs), gradients(fused, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_sixteen_bits_and_are_near(dtype: torch.dtype) -> None:
    exact = tensors(4, 2, 40, 40)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
    inputs = (q, k, v)
    found, _ = attend(MODULE, *inputs, None, segments=[30, 10])
    wanted, _ = attend(MODULE, *exact, None, segments=[30, 10])
    assert found.dtype == dtype
    assert_close(found.float(), wanted, atol=0.03, rtol=0.03)
    for ours, theirs in zip(gradients(found, inputs), gradients(wanted, exact), strict=True):
        assert_close(ours.float(), theirs, atol=0.1, rtol=0.1)


def made(name: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[name])
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=dtype
    ).train()


def packed(run: Callable[..., Any], rows: list[Tensor]) -> Tensor:
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    logits: Tensor = run(
        input_ids=torch.cat(rows)[None], position_ids=positions[None], segments=lengths
    ).logits
    return logits[0]


def rows_of(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(97, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("name", CONFIGS)
def test_pitfall_16_no_example_sees_another(name: str) -> None:
    """Logits and gradients of packed examples are those of each example alone, in transformers' own
    attention.
    """
    ours, theirs = made(name, register()), made(name, "eager")
    rows = rows_of(LENGTHS)
    logits = packed(ours, rows)
    alone = torch.cat([theirs(input_ids=row[None]).logits[0] for row in rows])
    assert_close(logits, alone, atol=1e-5, rtol=1e-4)
    for out in (logits, alone):
        torch.autograd.backward(out.logsumexp(-1).sum())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-3)
    changed = [rows[0], rows[1], rows[2].flip(0), rows[3]]
    same = packed(ours, changed).split_with_sizes(LENGTHS)
    for at in (0, 1, 3):
        assert_close(same[at], logits.split_with_sizes(LENGTHS)[at])


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_token_by_token_is_reading_at_once(name: str) -> None:
    """With a cache that a window has cut, too."""
    model = made(name, register()).eval()
    ids = rows_of([20])[0][None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :6], use_cache=True)
        parts, cache = [first.logits], first.cache
        for start, stop in ((6, 7), (7, 8), (8, 13), (13, 20)):
            step = model(input_ids=ids[:, start:stop], cache=cache, use_cache=True)
            parts.append(step.logits)
    assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    plain, checkpointed = made("llama", register()), made("llama", register())
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        torch.autograd.backward(packed(model, rows_of(LENGTHS)).logsumexp(-1).sum())
    for mine, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert_close(mine.grad, other.grad)


def test_sizes_alone_can_be_traced() -> None:
    with FakeTensorMode():
        for lengths in ([7, 5], [700, 5]):
            inputs = tensors(4, 2, sum(lengths), sum(lengths))
            out, _ = attend(MODULE, *inputs, None, segments=lengths)
            assert out.shape == (1, sum(lengths), 4, 8)
            assert gradients(out, inputs)[1].shape == inputs[1].shape


def test_registering_twice_is_registering_once() -> None:
    assert register() == register()


def test_masks_and_wrong_lengths_are_refused() -> None:
    inputs = tensors(2, 2, 4, 4)
    with pytest.raises(ValueError, match="no mask"):
        attend(MODULE, *inputs, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="add up"):
        attend(MODULE, *inputs, None, segments=[1, 2])


ROWS_AND_KEYS = {
    "lengths": st.lists(st.integers(1, 9), min_size=1, max_size=4),
    "before": st.integers(0, 3),
    "window": st.none() | st.integers(1, 10),
    "block": st.integers(1, 12),
}


@given(
    **ROWS_AND_KEYS,
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    softcap=st.none() | st.just(2.0),
    sinks=st.booleans(),
    rows=st.sampled_from([1, 2]),
)
@pytest.mark.slow
def test_an_accelerator_without_a_fused_kernel_reads_block_by_block_what_the_mask_shows(
    lengths: list[int],
    before: int,
    heads: tuple[int, int],
    window: int | None,
    block: int,
    softcap: float | None,
    sinks: bool,
    rows: int,
) -> None:
    """Values and all gradients, those of sinks too: of a row of packed sequences, or of several
    rows of one.
    """
    lengths = lengths if rows == 1 else lengths[:1]
    spans = [before + length for length in lengths]
    inputs = tensors(*heads, sum(lengths), sum(spans), rows=rows)
    s_aux = torch.linspace(-1, 1, heads[0]).requires_grad_() if sinks else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accelerator_attention, "BLOCK", block)
        found = _blockwise(*inputs, lengths, spans, Rule(0.4, window, softcap, s_aux))
        leaves: Any = inputs if s_aux is None else (*inputs, s_aux)
        ours = gradients(found, leaves)
    parts = zip(
        *(
            torch.split(x, sizes, 2)
            for x, sizes in zip(inputs, (lengths, spans, spans), strict=True)
        ),
        strict=True,
    )
    wanted = torch.cat([by_hand(a, b, c, 0.4, window, softcap, s_aux) for a, b, c in parts], 1)
    assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert_close(ours, gradients(wanted, leaves), atol=1e-5, rtol=1e-4)


@given(**ROWS_AND_KEYS)
def test_a_block_has_every_query_once_and_all_keys_that_it_sees(
    lengths: list[int], before: int, window: int | None, block: int
) -> None:
    spans, queries = [before + length for length in lengths], list[int]()
    bounds = accelerator_attention._seen((*lengths,), (*spans,), window, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accelerator_attention, "BLOCK", block)
        for part in seen_keys(lengths, spans, window):
            first, last = bounds[:, part.start : part.stop]
            assert (part.first, part.last) == (int(first.min()), int(last.max()) + 1)
            assert part.stop - part.start <= block
            queries += range(part.start, part.stop)
    assert queries == list(range(sum(lengths)))
