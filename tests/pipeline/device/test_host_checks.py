"""torch's own checks of what is passed to its private operators, on a device whose memory is the
host's and whose kernels do nothing: see `cuda_environment`.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.models.experts.grouped_product import grouped_product
from pipeline.models.kernels import accelerator_attention
from pipeline.models.kernels.accelerator import products
from pipeline.models.kernels.plain_attention import Rule
from pipeline.models.kernels.repeatable import RepeatableAttention
from pipeline.models.pages import PackedCache, PagePool, SequenceCache, Tables
from pipeline.training.optimizer import Adam, Span, fused_adam
from tests.helpers.cuda_device import CudaDevice
from tests.helpers.stand_in import STAND_IN

pytestmark = pytest.mark.skipif(
    STAND_IN.type != "cuda" or torch.cuda.get_device_capability() < (8, 0),
    reason="needs torch's CUDA build, and a GPU from Ampere on that its stub stands for",
)
PAGE = 256


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Not that of the folder, whose tensors are fake: torch checks real ones alone."""
    with CudaDevice():
        yield


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=STAND_IN)


def rule_of(window: bool, sinks: bool) -> Rule:
    return Rule(0.125, 8 if window else None, None, tensor(4).requires_grad_() if sinks else None)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("spans", [[5, 40], [9, 40]])
def test_packed_attention_and_its_gradients(spans: list[int], window: bool, sinks: bool) -> None:
    rule = rule_of(window, sinks)
    shapes = [(4, 45), (2, sum(spans)), (2, sum(spans))]
    q, k, v = (tensor(1, heads, tokens, 64).requires_grad_() for heads, tokens in shapes)
    out = accelerator_attention._flash(q, k, v, [5, 40], spans, rule)
    leaves = [leaf for leaf in (q, k, v, rule.sinks) if leaf is not None]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_attention_of_pages(monkeypatch: pytest.MonkeyPatch, window: bool, sinks: bool) -> None:
    monkeypatch.setattr(accelerator_attention, "AGREEMENT", math.inf)
    agree = accelerator_attention._pages_agree.__wrapped__
    assert agree(STAND_IN, torch.bfloat16, window, sinks)


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        (PAGE, {"k_starts": None}, "both set or both not set"),
        (16, {}, "divisible by 256"),
        (PAGE, {"pages": torch.int64}, "int32"),
        (PAGE, {"spans": torch.int64}, "int32"),
    ],
)
def test_attention_of_pages_that_torch_refuses(
    size: int, change: dict[str, torch.dtype | None], message: str
) -> None:
    pool = PagePool(size)
    cache = PackedCache([SequenceCache(pool, 2 * size)], [3])
    pages = cache.append(0, *[tensor(1, 2, 3, 64)] * 2)
    tables = cache.tables_on(STAND_IN)
    changed = {key: dtype and getattr(tables, key).to(dtype) for key, dtype in change.items()}
    cache._tables = Tables(**(tables._asdict() | changed))
    with pytest.raises(RuntimeError, match=message):
        accelerator_attention._paged(tensor(1, 4, 3, 64), pages, rule_of(False, False))


def test_attention_with_repeatable_gradients() -> None:
    q, k, v = (tensor(2, 4, 8, size).requires_grad_() for size in (64, 64, 32))
    out = RepeatableAttention.apply(q, k, v, 0.125)  # type: ignore[no-untyped-call]
    assert out.shape == (2, 4, 8, 32)
    grads = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.skipif(
    STAND_IN.type == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="torch has a kernel on Hopper and datacenter Blackwell alone",
)
def test_products_of_experts() -> None:
    x, weight = tensor(32, 64).requires_grad_(), tensor(4, 48, 64).requires_grad_()
    ends = torch.tensor([8, 16, 24, 32], dtype=torch.int32).to(STAND_IN)
    out = grouped_product(x, weight, ends)
    grads = torch.autograd.grad(out, [x, weight], torch.ones_like(out))
    assert [grad.shape for grad in grads] == [x.shape, weight.shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_added_in_fp32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(products, "AGREEMENT", math.inf)
    assert products.adds_in_fp32.__wrapped__(STAND_IN, dtype)


def test_fused_adam() -> None:
    tensors = [tensor(8, dtype=torch.float32) for _ in range(4)]
    step = tensor(dtype=torch.float32)
    for decay in (0.0, 0.1):
        fused_adam(tensors, step, Span(0, 8, 0.01, decay, Adam()))
