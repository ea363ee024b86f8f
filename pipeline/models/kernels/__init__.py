"""Faster forms of what a model computes. Which of them a device uses is decided here and nowhere else."""

import torch


def uses_cpu_kernels(device: torch.device) -> bool:
    """Whether kernels written for CPUs run. Every other device, `meta` included, takes the accelerators' paths: that is
    how the tests follow them on a machine without one."""
    return device.type == "cpu"
