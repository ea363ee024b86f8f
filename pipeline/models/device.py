"""The device a model runs on, and its memory."""

import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.project.logs.run_log import peak_memory
from pipeline.project.process_rank import world


def best_device() -> torch.device:
    """A CUDA GPU, or Apple's, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    distributed = world().world_size > 1  # processes exchange tensors, which Apple's GPU does not support
    return torch.device("mps" if torch.backends.mps.is_available() and not distributed else "cpu")


Model = TypeVar("Model", bound=nn.Module)

LARGE = 10_000_000  # parameters; below it an accelerator or a second thread costs more than it gains


def device_for(model: nn.Module) -> torch.device:
    """The device on which `model` is fastest. Also sets the number of CPU threads to what it can use.

    Matrix products as small as MiniGPT's gain nothing from a second thread, and two runs side by side, whose threads
    spin for each other's cores, were measured to take seven times as long.
    """
    large = sum(t.numel() for t in _tensors(model)) >= LARGE
    torch.set_num_threads(_threads() if large else 1)
    return best_device() if large else torch.device("cpu")


def move_for_inference(model: Model) -> Model:
    """`model`, moved to `device_for` it, or to the CPU if it does not fit into that device's free memory.

    Every model that answers goes through here; the training loop moves the model it trains, which it may shard.
    """
    device = device_for(model)
    return model.to(device if model_bytes(model) <= free_bytes(device) else "cpu")


def model_bytes(model: nn.Module) -> int:
    """Bytes of its parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in _tensors(model))


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinite where the system may swap."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def available_memory(device: torch.device) -> int:
    """Bytes that a process can use on `device` now: a GPU's free memory, or the machine's or container's for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = [page * os.sysconf("SC_PHYS_PAGES") // 2]  # where nothing says how much is free, as on macOS
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = [1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no container, or without a limit
            group = Path("/sys/fs/cgroup")
            sizes.append(int((group / limit).read_text()) - int((group / used).read_text()))
    return max(0, min(sizes))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16, so that it is faster than fp32 and not only smaller."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return True
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # macOS
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`: there it is queued, and the host does not wait for the copy."""
    if device.type == "cuda":  # only from pinned memory
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")


def read_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The numbers in the tensors, all on one device. The host waits until it has computed them: once for all."""
    rows = [tensor.detach().view(-1) for tensor in tensors]
    if not rows or rows[0].is_cpu:  # there is nothing to wait for, and joining them is one call more
        return [number for row in rows for number in row.tolist()]
    numbers: list[float] = torch.cat(rows).tolist()
    return numbers


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())  # quantized weights are buffers


def _threads() -> int:
    """OMP_NUM_THREADS, else this process's share of the cores."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(setting) if setting.isdigit() else cores() // world().local_world_size)


def cores() -> int:
    """The cores that this process may run on: fewer than the machine has in a container or under `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_info(device: torch.device) -> dict[str, Any]:
    """Kind and name of `device`, its used and total memory in bytes; on the CPU, used is this process's own."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        name, used = torch.cuda.get_device_name(), total - free
    elif device.type == "mps":
        name, used, total = "Apple GPU", torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    else:
        name, used = _processor(), _resident_bytes()
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": device.type, "name": name, "memory_used": used, "memory_total": total}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # macOS
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:  # macOS reports only the peak
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory until the process ends: a training step asks for the same sizes again.

    It otherwise returns freed blocks of megabytes to the system, and the next step pays a page fault for each 4 KiB of
    them. A LoRA step of SmolLM2-135M in bf16 takes 1/1.12 of the time (measured in turns on two cores and on one).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:  # musl has none
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
            mallopt(parameter, 2**31 - 1)
