"""The device that a model runs on and why, as `lora doctor` says; and its memory.

Nothing else decides where a model lives or a matrix is decomposed.
"""

import ctypes
import gc
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.files.text import in_units
from pipeline.project import process
from pipeline.project.process import world


def devices() -> list[str]:
    """The names of this machine's devices."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


def asked_device() -> torch.device | None:
    """The device of --device, LORA_DEVICE or the params file; None for auto.

    Raises UserError for a device that this machine does not have.
    """
    name, source = process.asked()
    if name == process.AUTO:
        return None
    if not process.is_valid(name):
        raise UserError(f"{source} must be {process.RULE}, got {name!r}. Change it.")
    rank = world()
    is_one_device = name == "mps" or ":" in name
    if rank.world_size > 1 and is_one_device:  # MPS has no collectives
        raise UserError(
            f"{source} must be cpu or cuda for several processes, got {name!r}. Each takes a GPU "
            "by its rank."
        )
    # compared as text: torch takes cuda:256 for cuda:0
    wanted = f"cuda:{rank.local_rank}" if name == "cuda" else name
    names = devices()
    if wanted not in names:
        raise UserError(
            f"{source} must name a device of this machine, got {name!r}. It has {', '.join(names)}."
        )
    return torch.device(wanted)


def best_device() -> torch.device:
    """The device that was asked for, else a GPU (one per rank) or the CPU. Raises UserError."""
    if (asked := asked_device()) is not None:
        return asked
    if torch.cuda.is_available():
        return torch.device("cuda", world().local_rank)
    # processes exchange tensors, which Apple's GPU does not support
    distributed = world().world_size > 1
    return torch.device("mps" if torch.backends.mps.is_available() and not distributed else "cpu")


Model = TypeVar("Model", bound=nn.Module)

# parameters; below it an accelerator or a second thread costs more than it gains
LARGE = 10_000_000
WITHOUT_FP64 = "mps"  # a type of device
LARGE_MATRIX = 1024**2  # numbers; a smaller matrix is decomposed in less than a second on two cores


def explain_choice() -> str:
    """Which device computes, and why."""
    name, source = process.asked()
    device = best_device()
    if name != process.AUTO:
        return f"{device}, by {source}"
    if device.type == "cpu":
        return "cpu: there is no accelerator"
    return (
        f"{device} for models of {LARGE // 10**6} million parameters or more, cpu for smaller "
        "ones (auto)"
    )


def device_for(model: nn.Module) -> torch.device:
    """`device_for_size` of the model."""
    return device_for_size(sum(t.numel() for t in _tensors(model)))


def device_for_size(parameters: int) -> torch.device:
    """The device that was asked for, else the fastest for a model of that size. Raises UserError.

    Also sets the number of CPU threads that the model can use, and the GPU on which libraries run
    their kernels.

    Matrix products as small as MiniGPT's gain nothing from a second thread, and two runs side by
    side, whose threads spin for each other's cores, were measured to take seven times as long.
    """
    large = parameters >= LARGE
    torch.set_num_threads(_threads() if large else 1)
    device = best_device() if large or asked_device() is not None else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def move_for_inference(model: Model, make_room: Callable[[], bool] = lambda: False) -> Model:
    """`model` on its `device_for`, or with a warning on the CPU if it does not fit there.

    `make_room` frees a part of the memory that others use, and returns False if there is none to
    free. Every model that answers goes through here; the training loop moves the model it trains,
    which it may shard.
    """
    device = device_for(model)
    missing, free = model_bytes(model, device), free_bytes(device)
    while missing > free and make_room():
        gc.collect()  # modules may refer to each other
        free = free_bytes(device)
    if missing > free:  # without a handler of its own, logging writes the line to stderr
        logging.getLogger(__name__).warning(
            f"the model needs {in_units(missing)} on {device}, which has {in_units(int(free))} "
            "free: it runs on the CPU"
        )
        device = torch.device("cpu")
    return model.to(device)


def device_for_matrix(numbers: int) -> torch.device:
    """Where to decompose a matrix of so many numbers in fp64: a large one on the accelerator."""
    on_best = numbers >= LARGE_MATRIX or asked_device() is not None
    return fp64_device(best_device() if on_best else torch.device("cpu"))


def fp64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU in place of Apple's GPU, which has neither fp64 nor an SVD."""
    return torch.device("cpu") if device.type == WITHOUT_FP64 else device


@contextmanager
def placed_for_inference(model: nn.Module) -> Iterator[None]:
    """`move_for_inference`, and back to the CPU afterwards.

    For a model that will train: the training loop moves or shards it.
    """
    move_for_inference(model)
    try:
        yield
    finally:
        model.to("cpu")


def model_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Bytes of its parameters and buffers, without those that are on `device` already."""
    return sum(t.numel() * t.element_size() for t in _tensors(model) if t.device != device)


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinite on the CPU, which may swap."""
    return float("inf") if device.type == "cpu" else available_memory(device)


def available_memory(device: torch.device) -> int:
    """Bytes that a process can use on `device` now, a container's limits included.

    What torch's allocator has freed but not returned is free for this process, though its driver
    counts it as used.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    from pipeline.files.memory import read_memory  # most runs do not ask

    return read_memory().available


class Limits(NamedTuple):
    """How much is answered at once, where memory holds it."""

    sequences: int  # that get a token from one forward
    prompt_tokens: int  # that are read per step
    row_tokens: int  # of texts to score, packed into one row


def device_limits(device: torch.device) -> Limits:
    """An accelerator waits for the weights, whatever the number of tokens; a CPU computes."""
    return Limits(16, 512, 1024) if device.type == "cpu" else Limits(256, 4096, 8192)


def fast_precision(device: torch.device) -> str:
    """bf16 where `device` has instructions for it, else fp16 on a GPU and fp32 on a CPU.

    A GPU of before Ampere emulates bf16, and its tensor cores multiply fp16 alone.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    words = " ".join(processor_facts()).split()
    has_bf16 = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)
    return "bf16" if has_bf16 or device.type == "mps" else "fp32"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. The host does not wait for the copy."""
    if device.type == "cuda":  # only from pinned memory
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")


def read_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The numbers in tensors of one device; the host waits for all of them once."""
    rows = [tensor.detach().view(-1) for tensor in tensors]
    # on the CPU there is nothing to wait for, and joining them is one more call
    if not rows or rows[0].is_cpu:
        return [*chain.from_iterable(row.tolist() for row in rows)]
    numbers: list[float] = torch.cat(rows).tolist()
    return numbers


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())  # quantized weights are buffers


def _threads() -> int:
    """OMP_NUM_THREADS if it is a plausible number, else this process's share of the cores."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if re.fullmatch("[1-9][0-9]{0,3}", setting):
        return int(setting)
    return max(1, cores() // world().local_world_size)


def cores() -> int:
    """The cores that this process may run on: under `taskset` fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_info(device: torch.device) -> dict[str, Any]:
    """`device`, its product's name, its used and total memory in bytes.

    On the CPU the used memory is that of this process.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name, used = torch.cuda.get_device_name(device), total - free
    elif device.type == "mps":
        name, total = "Apple GPU", torch.mps.recommended_max_memory()
        used = torch.mps.driver_allocated_memory()
    else:
        import psutil  # 25 ms, which most commands do not need

        models = [line for line in processor_facts() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else ""
        name = name or platform.processor() or platform.machine()
        used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    return {"device": str(device), "name": name, "memory_used": used, "memory_total": total}


def processor_facts() -> list[str]:
    """The lines of /proc/cpuinfo; none on macOS."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory, as each training step asks for the same sizes.

    It otherwise returns freed blocks of megabytes to the system, and the next step pays a page
    fault for each 4 KiB of them. A LoRA step of SmolLM2-135M in bf16 takes 1/1.12 of the time
    (measured in turns on two cores and on one).
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:  # musl has none
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
            mallopt(parameter, 2**31 - 1)


def release_workers() -> None:
    """End the worker threads of this thread's parallel loops, as another thread computes from now.

    OpenMP keeps workers for each thread that ever computed. With more of them than cores, GNU's
    sleep at every barrier, which otherwise is a wait of microseconds: that doubles the time of a
    token. New workers begin where they are needed.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    pause = getattr(library, "omp_pause_resource_all", None)
    if pause is not None:  # another runtime may have none
        pause(1)  # omp_pause_soft
