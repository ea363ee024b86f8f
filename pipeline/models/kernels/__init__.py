"""Faster forms of what a model computes. Which of them a device uses is decided here alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.project.probes import PLAIN, attempt


def uses_cpu_kernels(device: torch.device) -> bool:
    """Whether kernels written for CPUs run.

    Every other device, `meta` included, takes the accelerators' paths: that is how the tests follow
    them on a machine without one.
    """
    return device.type == "cpu"


def runs_flash_attention(device: torch.device) -> bool:
    """Whether flash attention has kernels for 16 bits: on an Ampere GPU or later, and on `meta`."""
    if device.type != "cuda":
        return device.type == "meta"
    return torch.cuda.get_device_capability(device) >= (8, 0)


def suits_flash_attention(q: Tensor, v: Tensor) -> bool:
    """Whether it has a kernel for queries and values (..., K): in 16 bits, of one head size."""
    K = q.shape[-1]
    has_size = K <= 256 and K % 8 == 0 and v.shape[-1] == K
    in_16_bits = q.dtype in (torch.bfloat16, torch.float16)
    return has_size and in_16_bits and runs_flash_attention(q.device)


def writes_scores(q: Tensor) -> bool:
    """Whether torch's attention keeps all scores of a row in memory."""
    if q.device.type == "mps":
        return True
    return q.is_cuda and q.dtype == torch.bfloat16 and not runs_flash_attention(q.device)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than the forward of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def random_tensors(*shapes: Sequence[int]) -> list[Tensor]:
    """Normal numbers to try a kernel on, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def agrees(
    tried: str, ours: Callable[[], Any], theirs: Callable[[], Any], rtol: float, atol: float
) -> bool:
    """Whether a faster part computes the tensor, or the tensors, that a model's own part does."""
    try:
        expected = theirs()
    except Exception:  # whatever a part of another kind raises
        return False
    actual = attempt(tried, PLAIN, ours)
    if actual is None:
        return False
    pairs = [(actual, expected)]
    if not isinstance(expected, Tensor):
        pairs = [*zip(actual, expected, strict=True)]
    return all(
        mine.dtype == other.dtype and torch.allclose(mine, other, rtol, atol)
        for mine, other in pairs
    )
