"""Faster forms of what a model computes. Which of them a device uses is decided here and nowhere else."""

import torch
from torch import Tensor


def uses_cpu_kernels(device: torch.device) -> bool:
    """Whether kernels written for CPUs run. Every other device, `meta` included, takes the accelerators' paths: that is
    how the tests follow them on a machine without one."""
    return device.type == "cpu"


def runs_flash_attention(device: torch.device) -> bool:
    """Whether flash attention has kernels there, for 16 bits: on an Ampere GPU or later. On `meta` as on such a GPU."""
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def suits_flash_attention(q: Tensor) -> bool:
    """Whether it has a kernel for queries (..., K): on such a device, in 16 bits, of its head sizes."""
    K = q.shape[-1]
    return q.dtype in (torch.bfloat16, torch.float16) and K <= 256 and K % 8 == 0 and runs_flash_attention(q.device)
