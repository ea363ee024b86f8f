"""Attention on an accelerator, by torch's flash attention of packed sequences, which stands on the
CPU here.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pipeline.models import kernels
from pipeline.models.kernels import accelerator_attention
from pipeline.models.kernels.accelerator_attention import attend_on_accelerator
from pipeline.models.kernels.packed_attention import attend
from pipeline.models.kernels.plain_attention import (
    Rule,
    attend_explicit,
    split_sequences,
    visible_keys,
)
from pipeline.models.kernels.repeatable import RepeatableAttention, repeatable
from pipeline.project.probes import held
from tests.helpers.reference_flash import reference_flash

varlen = pytest.importorskip("torch.nn.attention.varlen")  # after torch 2.9
varlen_attn = varlen.varlen_attn

Three = tuple[Tensor, Tensor, Tensor]
SETTINGS: Any = deterministic
ROW = {
    "lengths": st.lists(st.integers(1, 9), min_size=1, max_size=4),
    "before": st.integers(0, 3),
    "heads": st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    "window": st.none() | st.integers(1, 10),
}


def row(
    heads: tuple[int, int], queries: int, keys: int, size: int = 16, values: int | None = None
) -> Three:
    """q, k and v of one row in fp16; `values`: the size of the value heads."""
    generator = torch.Generator().manual_seed(queries * 31 + keys)
    shapes = (heads[0], queries, size), (heads[1], keys, size), (heads[1], keys, values or size)
    q, k, v = (
        torch.randn(1, *shape, generator=generator).half().requires_grad_() for shape in shapes
    )
    return q, k, v


def in_fp32(inputs: Three) -> Three:
    """Leaves of their own."""
    q, k, v = (x.detach().float().requires_grad_() for x in inputs)
    return q, k, v


def explicit(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule
) -> Tensor:
    """Each sequence by its scores, in the leaves' precision: (1, T, H, K)."""
    queries, pairs = q.split_with_sizes(lengths, 2), split_sequences(k, v, spans)
    masks = [visible_keys(t, s, rule.window, q.device) for t, s in zip(lengths, spans, strict=True)]
    parts = zip(queries, pairs, masks, strict=True)
    each = [attend_explicit(own, *pair, rule, mask) for own, pair, mask in parts]
    return torch.cat(each, 2).transpose(1, 2)


def compare(
    leaves: Three,
    lengths: list[int],
    spans: list[int],
    window: int | None = None,
    sinks: bool = False,
    softcap: float | None = None,
) -> None:
    """Values and gradients on the accelerator, of fp16, are those of fp32 by the scores."""
    results = []
    for attention, inputs in ((attend_on_accelerator, leaves), (explicit, in_fp32(leaves))):
        sink = torch.linspace(-1, 1, inputs[0].shape[1]).requires_grad_() if sinks else None
        out = attention(*inputs, lengths, spans, Rule(0.4, window, softcap, sink))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        results.append(
            [out, *torch.autograd.grad(out, inputs if sink is None else [*inputs, sink], grad)]
        )
    for found, wanted in zip(*results, strict=True):
        assert_close(found.float(), wanted, atol=1e-2, rtol=1e-2)


def pack(x: Tensor) -> Tensor:
    """(1, H, T, K) → (T, H, K)."""
    return x.transpose(1, 2).flatten(0, 1)


@given(**ROW, sinks=st.booleans())
def test_flash_attention_of_a_packed_row_has_the_values_and_gradients_of_the_scores(
    lengths: list[int], before: int, heads: tuple[int, int], window: int | None, sinks: bool
) -> None:
    spans = [before + length for length in lengths]
    with reference_flash() as calls:
        compare(row(heads, sum(lengths), sum(spans)), lengths, spans, window, sinks)
    assert calls.forward or lengths == [1]


def test_rows_are_sequences_of_their_own() -> None:
    q, k, v = (torch.cat([x, x.flip(2)]).detach() for x in row((4, 2), 6, 6))
    with reference_flash() as calls:
        out = attend_on_accelerator(q, k, v, [6], [6], Rule(0.4))
    for n, own in enumerate(out):
        wanted = explicit(*in_fp32((q[n : n + 1], k[n : n + 1], v[n : n + 1])), [6], [6], Rule(0.4))
        assert_close(own[None].float(), wanted, atol=1e-2, rtol=1e-2)
    assert calls.forward == 1


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1)])
def test_the_reference_is_torchs_attention_with_its_gradients(window: tuple[int, int]) -> None:
    """Torch's `varlen_attn` and autograd on the reference, against its attention of a row with a
    mask.
    """
    q, k, v = row((4, 2), 7, 9)
    at = torch.arange(7)[:, None] + 2
    keys, (left, right) = torch.arange(9)[None], window
    mask = (keys >= at - left if left >= 0 else torch.tensor(True)) & (
        keys <= at + right if right >= 0 else True
    )
    options: dict[str, Any] = {"scale": 0.4, "enable_gqa": True}
    starts = torch.tensor([0, 7], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32)
    grad = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0)).half()
    with reference_flash():
        found = varlen_attn(pack(q), pack(k), pack(v), *starts, 7, 9, **options, window_size=window)
        ours = torch.autograd.grad(found, (q, k, v), grad)
    wide = in_fp32((q, k, v))
    wanted = pack(F.scaled_dot_product_attention(*wide, mask.expand(7, 9), **options))
    assert isinstance(found, Tensor)
    assert_close(found.float(), wanted, atol=1e-2, rtol=1e-2)
    for own, other in zip(ours, torch.autograd.grad(wanted, wide, grad.float()), strict=True):
        assert_close(own.float(), other, atol=1e-2, rtol=1e-2)


WRONG: dict[str, tuple[str, Any]] = {
    "fp32": ("fp16 and bf16", lambda q, k, v, *starts: (q.float(), k.float(), v.float(), *starts)),
    "int64 starts": ("starts", lambda q, k, v, a, b: (q, k, v, a.long(), b)),
    "other value heads": (
        "head size 16",
        lambda q, k, v, *starts: (q, k, v[..., :8].contiguous(), *starts),
    ),
    "head size 12": ("head size 12", lambda *x: (*(y[..., :12] for y in x[:3]), *x[3:])),
    "strides": (
        "contiguous last",
        lambda q, *x: (q.transpose(1, 2).contiguous().transpose(1, 2), *x),
    ),
    "starts that end early": ("beyond", lambda q, k, v, a, b: (q, k, v, a - (a > 0).int(), b)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_reference_rejects_what_the_kernel_rejects_or_would_misread(wrong: str) -> None:
    match, change = WRONG[wrong]
    starts = torch.tensor([0, 4], dtype=torch.int32)
    q, k, v = (pack(x.detach()) for x in row((2, 2), 4, 4))
    q, k, v, q_starts, k_starts = change(q, k, v, starts, starts)
    with reference_flash(), pytest.raises(AssertionError, match=match):
        varlen_attn(q, k, v, q_starts, k_starts, 4, 4)


def test_outside_of_it_the_cpu_has_no_flash_attention() -> None:
    starts = torch.tensor([0, 4], dtype=torch.int32)
    q, k, v = (pack(x.detach()) for x in row((2, 2), 4, 4))
    with reference_flash():
        varlen_attn(q, k, v, starts, starts, 4, 4)
    with pytest.raises(NotImplementedError):
        varlen_attn(q, k, v, starts, starts, 4, 4)
    assert not kernels.runs_flash_attention(q.device)


@given(
    **ROW, sinks=st.booleans(), softcap=st.none() | st.just(2.0), values=st.sampled_from([8, 24])
)
def test_values_of_another_size_than_queries_are_attended_to_without_flash_attention(
    lengths: list[int],
    before: int,
    heads: tuple[int, int],
    window: int | None,
    sinks: bool,
    softcap: float | None,
    values: int,
) -> None:
    """As in multi-head latent attention (DeepSeek). Its kernels have one size of heads."""
    spans = [before + length for length in lengths]
    with reference_flash() as calls:
        compare(
            row(heads, sum(lengths), sum(spans), values=values),
            lengths,
            spans,
            window,
            sinks,
            softcap,
        )
    assert not calls.forward


@pytest.mark.parametrize("training", [True, False])
def test_so_are_they_on_a_cpu(training: bool) -> None:
    module: Any = SimpleNamespace(training=training, layer_idx=0)
    for lengths in ([5, 3], [6], [1]):
        leaves = in_fp32(row((4, 2), sum(lengths), sum(lengths), values=24))
        out, _ = attend(module, *leaves, None, scaling=0.4, segments=lengths)
        wanted = explicit(*leaves, lengths, lengths, Rule(0.4))
        assert_close(out, wanted)
        grad = torch.randn_like(out)
        assert_close(
            torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, leaves, grad)
        )


@pytest.fixture
def unprobed() -> Iterator[None]:
    accelerator_attention._agrees.cache_clear()
    yield
    accelerator_attention._agrees.cache_clear()


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("before", [0, 2])
def test_on_an_amd_gpu_a_kernel_that_computes_something_else_is_not_taken(
    before: int, window: int | None, sinks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = [9, 3]
    spans = [before + length for length in lengths]
    with reference_flash(rocm=True) as calls:
        compare(row((4, 2), sum(lengths), sum(spans)), lengths, spans, window, sinks)
        compare(row((4, 2), sum(lengths), sum(spans)), lengths, spans, window, sinks)
        taken = calls.forward == 3  # two rows and the probe
    assert taken == (window is None and not sinks and not before), (
        "a row of packed sequences alone is right there"
    )
    assert len(caplog.records) == (not taken), "once a device"
    assert taken or "take longer" in caplog.text


@pytest.mark.usefixtures("unprobed")
def test_on_an_amd_gpu_a_kernel_that_computes_the_same_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a recomputed block, too: what the probe keeps for its backward is not the block's."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    leaves = row((4, 2), 12, 12)
    with reference_flash() as calls:
        for window in (None, 4):
            out = checkpoint(
                attend_on_accelerator,
                *leaves,
                [9, 3],
                [9, 3],
                Rule(0.4, window),
                use_reentrant=False,
            )
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        with torch.inference_mode():
            accelerator_attention._agrees.cache_clear()
            attend_on_accelerator(*leaves, [9, 3], [9, 3], Rule(0.4))
    assert not caplog.records and calls.forward == 2 * 2 + 1 + 3, (
        "forward, recomputed, without gradients, and probes"
    )


@pytest.mark.usefixtures("unprobed")
def test_a_prediction_of_memory_asks_nothing_of_an_amd_gpu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its tensors have no numbers, and what it was told would be believed by the run after it."""
    with reference_flash(rocm=True), FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 12, 16, dtype=torch.float16) for _ in range(3))
        attend_on_accelerator(q, k, v, [9, 3], [9, 3], Rule(0.4, 4))
    assert not caplog.records and not accelerator_attention._agrees.cache_info().currsize


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("lengths", [[9], [5, 4]])
def test_flash_attentions_gradients_are_added_in_a_fixed_order(
    lengths: list[int], sinks: bool
) -> None:
    with reference_flash() as calls:
        compare(row((4, 2), 9, 9), lengths, lengths, sinks=sinks)
    assert calls.repeatable == [True]
    assert torch.get_deterministic_debug_mode() == 0 and SETTINGS.fill_uninitialized_memory


@pytest.mark.parametrize("values", [16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_so_are_those_of_rows_that_flash_attention_does_not_compute(
    values: int, dtype: torch.dtype
) -> None:
    """On CUDA in fp32, before Ampere, with values of another size: by torch's memory-efficient
    kernel.
    """
    leaves = row((4, 4), 9, 9, values=values)
    q, k, v = (x.float() for x in leaves)
    with reference_flash() as calls:
        out: Tensor = RepeatableAttention.apply(*(x.to(dtype) for x in leaves), 0.4)  # type: ignore[no-untyped-call]
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = torch.autograd.grad(out, leaves, grad)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
    assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)
    assert_close(found, torch.autograd.grad(wanted, leaves, grad.float()), atol=1e-2, rtol=1e-2)
    assert calls.repeatable == [True]


def test_a_backward_that_fails_leaves_torch_as_it_was() -> None:
    with pytest.raises(MemoryError), repeatable():
        assert torch.get_deterministic_debug_mode() == 2 and not SETTINGS.fill_uninitialized_memory
        raise MemoryError
    assert torch.get_deterministic_debug_mode() == 0 and SETTINGS.fill_uninitialized_memory


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The number of elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))]
        )
        return out


@pytest.mark.parametrize("lengths", [[1500], [1400, 100]])
def test_a_device_whose_fused_attention_writes_all_scores_reads_long_rows_in_blocks(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's GPU, for which a CPU stands here, with torch's attention that writes them."""
    monkeypatch.setattr(accelerator_attention, "writes_scores", lambda _: True)
    T = sum(lengths)
    leaves = in_fp32(row((2, 1), T, T, 8))
    with sdpa_kernel(SDPBackend.MATH), Largest() as largest:  # type: ignore[no-untyped-call]
        out = attend_on_accelerator(*leaves, lengths, lengths, Rule(0.4))
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert largest.elements <= 2 * accelerator_attention.BLOCK * T, "not 2 · T · T"
    assert_close(out, explicit(*leaves, lengths, lengths, Rule(0.4)), atol=1e-5, rtol=1e-5)


def test_it_does_on_apples_gpu_and_in_bf16_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(device: str, dtype: torch.dtype, ampere: bool = True) -> bool:
        monkeypatch.setattr(kernels, "runs_flash_attention", lambda _: ampere)
        q: Any = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype)
        return kernels.writes_scores(q)

    assert writes("mps", torch.float32) and writes("cuda", torch.bfloat16, ampere=False)
    assert not writes("cuda", torch.bfloat16) and not writes("cuda", torch.float16, ampere=False)


@pytest.mark.parametrize("agrees", [True, False, None], ids=["agrees", "differs", "raises"])
def test_flash_attention_3_is_taken_on_hopper_where_it_agrees(
    agrees: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch_attention, "activate_flash_attention_impl"):
        pytest.skip("an older torch")
    done = list[str]()

    def activate(name: str) -> None:
        done.append(name)
        if agrees is None:
            raise RuntimeError("no kernel image")

    monkeypatch.setattr(accelerator_attention, "find_spec", lambda _: object())
    monkeypatch.setattr(accelerator_attention, "_agrees", lambda *_: agrees)
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", lambda: done.append("own"))
    take = accelerator_attention.take_flash_3.__wrapped__
    for capability in ((8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert not take(torch.device("cuda")) and not done
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not take(torch.device("cpu"))
    with held():
        assert take(torch.device("cuda")) == bool(agrees)
    assert done == (["FA3"] if agrees else ["FA3", "own"])
