"""NVIDIA's GPUs, read by NVML: use, memory, temperature, power, and memory by process."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """A GPU: its short name, such as H100, and its memory in bytes."""

    name: str
    memory: int


class GpuReading(NamedTuple):
    """One look at a GPU; None for what it does not tell. `load` is a share of time, memory is in
    bytes.
    """

    load: float | None = None
    memory: int | None = None
    temperature: int | None = None  # °C
    power: float | None = None  # watts


WHY_NONE = {  # NVML's error → why there is no GPU
    "NVMLError_LibraryNotFound": "No NVIDIA GPU: its driver is not installed on this machine.",
    "NVMLError_DriverNotLoaded": "No NVIDIA GPU: its driver is not loaded.",
    "NVMLError_LibRmVersionMismatch": (
        "The GPU cannot be read: the NVIDIA driver was updated. Reboot to load the new one."
    ),
}


class Gpus:
    """All GPUs of the machine. `problem`: one sentence if there are none or one cannot be read; ""
    if all is well.
    """

    def __init__(self) -> None:
        import pynvml  # 18 ms, so in the thread that reads

        self._nvml = pynvml
        self.devices: list[Gpu] = []
        self._handles: list[Any] = []
        self._missing = "No NVIDIA GPU: the driver lists none."
        try:
            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                name, memory = pynvml.nvmlDeviceGetName(handle), self._memory(handle)
                self._handles.append(handle)
                self.devices.append(Gpu(short_name(name), int(memory.total)))
                self._missing = ""
        except pynvml.NVMLError as error:
            why = f"The GPU cannot be read: {_reason(error)}."
            self._missing = WHY_NONE.get(type(error).__name__, why)
        self.problem = self._missing

    def _memory(self, handle: Any) -> Any:
        """As nvidia-smi shows it: without what the driver reserves."""
        return self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)

    def read(self) -> tuple[GpuReading, ...]:
        """A reading of each GPU. A GPU that was lost has an empty one, and `problem` says so until
        it is back.
        """
        problems, readings = [self._missing], list[GpuReading]()
        for index, handle in enumerate(self._handles):
            try:
                readings.append(self._read_one(handle))
            except self._nvml.NVMLError as error:
                name = f"GPU {index} ({self.devices[index].name})"
                problems.append(f"{name} cannot be read any more: {_reason(error)}.")
                readings.append(GpuReading())
        self.problem = " ".join(filter(None, problems))
        return tuple(readings)

    def _read_one(self, handle: Any) -> GpuReading:
        nvml = self._nvml

        def get(read: Callable[[], float]) -> Any:
            try:
                return read()
            except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
                return None  # a MIG slice or an old card: it never tells

        return GpuReading(
            get(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            get(lambda: int(self._memory(handle).used)),
            get(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            get(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        )

    def memory_by_process(self) -> dict[int, int]:
        """Process id → bytes on all GPUs. Empty where NVML does not tell, as in most containers."""
        sizes = Counter[int]()
        for handle in self._handles:
            with suppress(self._nvml.NVMLError):
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    sizes[process.pid] += process.usedGpuMemory or 0
        return sizes


def _reason(error: Exception) -> str:
    return str(error).rstrip(".")


def short_name(name: str) -> str:
    """NVIDIA H100 80GB HBM3 → H100, NVIDIA GeForce RTX 4090 → RTX 4090, Tesla T4 → T4."""
    short = re.sub(r"^((NVIDIA|GeForce|Tesla|Quadro)\s+)+", "", name.strip())
    return re.split(r"[\s-](?=(SXM|PCI|HBM|NVL|\d+ ?GB))", short, maxsplit=1)[0] or name
