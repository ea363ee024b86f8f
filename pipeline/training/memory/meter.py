"""Meters of a training step's peak memory: the tensors alive, or on a GPU what CUDA's allocator counts anyway."""

import os
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.calc.settings import CONTEXT
from pipeline.calc.tape import ROUNDING
from pipeline.project.logs.run_log import in_units


class MemoryMeter(Protocol):
    """Measures what runs inside its context. `peak`: bytes of tensors on one device; 0: nothing ran yet."""

    peak: int

    @property
    def beside(self) -> str:
        """What the device holds beside these tensors, to append to a sentence; empty if it is not measured."""

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these too, which were there before."""

    def __enter__(self) -> Any: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None, /
    ) -> Any: ...


def memory_meter(device: torch.device) -> MemoryMeter:
    return CudaMemoryMeter(device) if device.type == "cuda" else TensorMemoryMeter(device)


class CudaMemoryMeter:
    """The allocator's own numbers, which cost nothing: also of what FSDP or a library allocates by itself.

    `reserved`: bytes that it has taken from the device, gaps between tensors included. `context`: bytes of the process
    there beside them, its CUDA context and kernels; 0: not known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = self.reserved = self.context = 0

    @property
    def beside(self) -> str:
        context = f"{in_units(self.context)} of CUDA context" if self.context else ""
        estimate = f"CUDA's context was not measured: {in_units(CONTEXT)} is an estimate"
        return f"; {in_units(self.reserved)} reserved by the allocator, {context or estimate}"

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to do: it counts every tensor of the process."""

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self._device)
        self.reserved = torch.cuda.max_memory_reserved(self._device)
        used = process_bytes(self._device)
        self.context = max(0, used - torch.cuda.memory_reserved(self._device)) if used else 0


def process_bytes(device: torch.device) -> int:
    """Bytes that this process uses on a GPU, its CUDA context included, as the driver counts them; 0 if it does not
    say, as in a container, where the process has another number."""
    import pynvml  # a run on a CPU does not load it

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return next((one.usedGpuMemory for one in processes if one.pid == os.getpid()), 0) or 0
    except (pynvml.NVMLError, AttributeError):
        return 0


class TensorMemoryMeter(TorchDispatchMode):
    """Inside the context, sums the sizes of all live storages, rounded as CUDA's allocator does; `peak` is the maximum.

    With `device` only of tensors there: a paged optimizer's state is elsewhere. Results are bit for bit the same; each
    operation takes some microseconds longer.
    """

    beside = ""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def watch(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if self._device is not None and tensor.device.type != self._device.type:
                continue
            storage = tensor.untyped_storage()  # a view adds nothing: it has its base's storage
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = -(-storage.nbytes() // ROUNDING) * ROUNDING
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, key)  # no reference, which would keep it alive

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler, which takes 1.4 seconds; nothing here is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])
        return out
