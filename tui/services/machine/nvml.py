"""NVIDIA's GPUs, read by NVML: use, memory, temperature, power, and memory by process."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


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


class Gpus:
    """All GPUs of the machine. `problem`: one sentence if there are none or one cannot be read; ""
    if all is well.
    """

    def __init__(self) -> None:
        self.devices: list[Gpu] = []
        self.problem = ""
        self._handles: list[Any] = []
        import pynvml  # 18 ms, so in the thread that reads

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                name, memory = (
                    pynvml.nvmlDeviceGetName(handle),
                    pynvml.nvmlDeviceGetMemoryInfo(handle),
                )
                self._handles.append(handle)
                self.devices.append(Gpu(short_name(name), int(memory.total)))
        except pynvml.NVMLError_LibraryNotFound:
            self.problem = "No NVIDIA GPU: its driver is not installed on this machine."
        except pynvml.NVMLError_DriverNotLoaded:
            self.problem = "No NVIDIA GPU: its driver is not loaded."
        except pynvml.NVMLError_LibRmVersionMismatch:
            self.problem = (
                "The GPU cannot be read: the NVIDIA driver was updated. Reboot to load the new one."
            )
        except pynvml.NVMLError as error:
            number = f"GPU {len(self._handles)}" if self._handles else "The GPU"
            self.problem = f"{number} cannot be read: {_reason(error)}."
        else:
            if not self._handles:
                self.problem = "No NVIDIA GPU: the driver lists none."
        self._missing = self.problem

    def read(self) -> tuple[GpuReading, ...]:
        """A reading of each GPU. A GPU that was lost has an empty one, and `problem` says so until
        it is back.
        """
        problems: list[str] = []
        readings = tuple(
            self._read_one(index, handle, problems) for index, handle in enumerate(self._handles)
        )
        if self._handles:
            self.problem = " ".join([self._missing, *problems]).strip()
        return readings

    def _read_one(self, index: int, handle: Any, problems: list[str]) -> GpuReading:
        nvml = self._nvml

        def get(read: Callable[[], T]) -> T | None:
            try:
                return read()
            except (
                nvml.NVMLError_NotSupported,
                nvml.NVMLError_NoPermission,
                nvml.NVMLError_FunctionNotFound,
            ):
                return None  # a MIG slice or an old card: it never tells

        try:
            load = get(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            power = get(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
            return GpuReading(
                None if load is None else load / 100,
                get(lambda: int(self._memory(handle).used)),
                get(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
                None if power is None else power / 1000,
            )
        except nvml.NVMLError as error:
            problems.append(
                f"GPU {index} ({self.devices[index].name}) cannot be read any more: "
                f"{_reason(error)}."
            )
            return GpuReading()

    def _memory(self, handle: Any) -> Any:
        """As nvidia-smi shows it: without what the driver reserves, which only newer ones tell
        apart.
        """
        try:
            return self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
        except (
            self._nvml.NVMLError_FunctionNotFound,
            self._nvml.NVMLError_ArgumentVersionMismatch,
        ):
            return self._nvml.nvmlDeviceGetMemoryInfo(handle)

    def memory_by_process(self) -> dict[int, int]:
        """Process id → bytes on all GPUs. Empty where NVML does not tell, as in most containers."""
        sizes: dict[int, int] = {}
        for handle in self._handles:
            try:
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    sizes[process.pid] = sizes.get(process.pid, 0) + (process.usedGpuMemory or 0)
            except self._nvml.NVMLError:
                continue
        return sizes


def _reason(error: Exception) -> str:
    return str(error).rstrip(".")


def short_name(name: str) -> str:
    """NVIDIA H100 80GB HBM3 → H100, NVIDIA GeForce RTX 4090 → RTX 4090, Tesla T4 → T4."""
    short = re.sub(r"^((NVIDIA|GeForce|Tesla|Quadro)\s+)+", "", name.strip())
    return re.split(r"[\s-](?=(SXM|PCI|HBM|NVL|\d+ ?GB))", short, maxsplit=1)[0] or name
