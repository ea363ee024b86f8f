"""Faster forms of what a model computes. Which of them a device uses is decided here and nowhere
else.
"""

import torch
from torch import Tensor


def uses_cpu_kernels(device: torch.device) -> bool:
    """Whether kernels written for CPUs run. Every other device, `meta` included, takes the
    accelerators' paths: that is how the tests follow them on a machine without one."""
    return device.type == "cpu"


def runs_flash_attention(device: torch.device) -> bool:
    """Whether flash attention has kernels there, for 16 bits: on an Ampere GPU or later. On `meta`
    as on such a GPU.
    """
    return device.type == "meta" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def suits_flash_attention(q: Tensor, v: Tensor) -> bool:
    """Whether it has a kernel for queries and values (..., K): on such a device, in 16 bits, of one
    head size.
    """
    K = q.shape[-1]
    has_size = K <= 256 and K % 8 == 0 and v.shape[-1] == K
    return (
        has_size and q.dtype in (torch.bfloat16, torch.float16) and runs_flash_attention(q.device)
    )


def writes_scores(q: Tensor) -> bool:
    """Whether torch's attention keeps all scores of a row in memory: on Apple's GPU, and in bf16
    before Ampere.
    """
    return q.device.type == "mps" or (
        q.is_cuda and q.dtype == torch.bfloat16 and not runs_flash_attention(q.device)
    )
