"""The best device here, and how full it is."""

import os
import platform
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.project.logs.run_log import peak_memory
from pipeline.project.process_rank import world


def best_device() -> torch.device:
    """A CUDA GPU, or Apple's, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    several = not world().alone  # what they tell each other of tensors cannot pass through Apple's GPU
    return torch.device("mps" if torch.backends.mps.is_available() and not several else "cpu")


Model = TypeVar("Model", bound=nn.Module)

LARGE = 10_000_000  # parameters; below it an accelerator, or a second thread, costs more than it gains


def device_for(model: nn.Module) -> torch.device:
    """Where `model` is best trained and asked; of the CPU's threads it gets as many as it can use.

    Products as small as MiniGPT's gain nothing from a second thread, and two runs side by side, whose threads spin for
    each other's cores, were measured to take seven times as long.
    """
    large = sum(t.numel() for t in _tensors(model)) >= LARGE
    torch.set_num_threads(_threads() if large else 1)
    return best_device() if large else torch.device("cpu")


def placed(model: Model) -> Model:
    """`model`, moved to where it is asked: `device_for` it, or the CPU where that device's free memory is too small.

    Every model that answers goes through here; one that trains is moved by the training loop, which may share it out.
    """
    device = device_for(model)
    return model.to(device if size(model) <= free(device) else "cpu")


def size(model: nn.Module) -> int:
    """Bytes of its tensors."""
    return sum(t.numel() * t.element_size() for t in _tensors(model))


def free(device: torch.device) -> float:
    """Bytes that can still be allocated there; infinite where the system may swap."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _tensors(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return (*model.parameters(), *model.buffers())  # quantized weights are buffers


def _threads() -> int:
    """What the user says, else this process's share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(said) if said.isdigit() else cores() // world().local_size)


def cores() -> int:
    """The cores that this process may run on: a container or `taskset` may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(device: torch.device) -> dict[str, Any]:
    """Its kind and name, and bytes of its memory used and in all; of the CPU, those that this process holds."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        name, used = torch.cuda.get_device_name(), total - free
    elif device.type == "mps":
        name, used, total = "Apple GPU", torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    else:
        name, used = _processor(), _resident()
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": device.type, "name": name, "memory_used": used, "memory_total": total}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # macOS
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:  # macOS says the peak only
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")
