"""Losses in chunks: value and gradients of the plain computation, whatever the size of the
chunks.
"""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.training.losses import CHUNK, chunk_of, chunked_mean, cross_entropy, divergence
from tests.helpers.real import toy

N, D, V = 11, 8, 50
SIZES = (1, 4, 10, 11, 128)


def heads() -> tuple[nn.Linear, nn.Linear, Tensor]:
    """Two heads and rows (N, D), the same each time."""
    torch.manual_seed(0)
    one, other = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=False)
    return one, other, torch.randn(N, D, requires_grad=True)


def gradients(loss: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * loss, of)  # of a loss that is scaled, as a step scales it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_cross_entropy_in_chunks_is_pytorchs(
    size: int, trains_head: bool, dtype: torch.dtype
) -> None:
    head, _, wide = heads()
    labels, rows = torch.randint(V, (N,)), wide.detach().to(dtype).requires_grad_()
    head.to(dtype).requires_grad_(trains_head)
    trained = [*head.parameters()] if trains_head else []
    wanted = F.cross_entropy(head(rows).float(), labels)
    found = chunked_mean(cross_entropy(head), rows, labels, size, trained)
    assert found.dtype == torch.float32
    assert_close(found, wanted)
    rtol, atol = (2e-2, 2e-3) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    for mine, theirs in zip(
        gradients(found, [rows, *trained]), gradients(wanted, [rows, *trained]), strict=True
    ):
        assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", SIZES)
def test_the_divergence_in_chunks_is_pytorchs(size: int) -> None:
    head, reference, rows = heads()
    targets = torch.randn(N, D)
    p = reference(targets).log_softmax(-1).detach()
    wanted = F.kl_div(head(rows).log_softmax(-1), p, reduction="batchmean", log_target=True)
    found = chunked_mean(divergence(head, reference), rows, targets, size, [*head.parameters()])
    assert_close(found, wanted)
    assert_close(gradients(found, [rows, head.weight]), gradients(wanted, [rows, head.weight]))


def test_a_cpu_computes_equal_parts_and_no_more_of_them_than_it_must() -> None:
    model = toy("llama")
    assert chunk_of(model, 0) == CHUNK
    for rows in range(1, 5 * CHUNK):
        size = chunk_of(model, rows)
        parts = -(-rows // size)
        assert size <= CHUNK and parts == -(-rows // CHUNK)
        assert size * parts - rows < parts, "the last is shorter by less than a row for each part"
