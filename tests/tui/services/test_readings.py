"""The machine over time: this one as psutil sees it, GPUs by a scripted NVML."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pipeline.files.memory import Memory
from tui.services.machine import readings as module
from tui.services.machine.nvml import Gpu, Gpus, short_name
from tui.services.machine.readings import Machine, Sample

GIB = 2**30


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST", 0.05)
    monkeypatch.setattr(module, "EVERY", 0.05)


@pytest.fixture
def started() -> Iterator[Callable[..., Machine]]:
    machines: list[Machine] = []

    def start(processes: Callable[[], Mapping[str, int]] = dict) -> Machine:
        machines.append(Machine(processes))
        machines[-1].start()
        return machines[-1]

    yield start
    for machine in machines:
        machine.stop()


def sampled(
    machine: Machine, ready: Callable[[Sample], bool] = lambda _: True, count: int = 1
) -> Sample:
    """The last sample, once there are `count` and it is as wanted."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        samples = machine.samples
        if len(samples) >= count and ready(samples[-1]):
            return samples[-1]
        time.sleep(0.02)
    pytest.fail(f"no such sample: {machine.last} {machine.problem}")


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("auto", "2 × A"),
        ("cuda", "2 × A"),
        ("cuda:1", "B"),
        ("cuda:7", "cpu"),
        ("cpu", "cpu"),
        ("?", "cpu"),
    ],
)
def test_the_device_that_trains_is_the_one_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, name: str
) -> None:
    monkeypatch.setenv("LORA_DEVICE", asked)
    machine = Machine()
    machine.gpus = [Gpu("A", GIB), Gpu("B", GIB)]
    assert machine.name == name


def test_this_machine_is_read_over_time(started: Callable[..., Machine]) -> None:
    machine = started()
    assert machine.last is None and machine.summary() == ""
    sample = sampled(machine, count=3)
    assert sample.cpu is not None and 0 <= sample.cpu <= 1
    assert sample.memory is not None and 0 < sample.memory <= machine.memory
    times = [each.time for each in machine.samples]
    assert times == sorted(times) and machine.problem == ""
    assert machine.cores >= 1


def test_a_process_is_followed_with_its_children_until_it_is_gone(
    started: Callable[..., Machine],
) -> None:
    child = "block = bytearray(2**27); block[::4096] = b'x' * len(block[::4096]); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    try:
        machine = started(
            lambda: {"stage": process.pid, "workbench": os.getpid(), "gone": 2**22 + 1}
        )
        sample = sampled(
            machine, lambda s: "stage" in s.processes and s.processes["stage"].memory > 2**27
        )
        assert sample.processes.keys() == {"stage", "workbench"}
        assert sample.processes["workbench"].gpu_memory is None
    finally:
        process.communicate(b"\n")
    sampled(machine, lambda s: "stage" not in s.processes)


def test_a_reading_that_fails_is_one_sentence_and_the_next_may_succeed(
    started: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True

    def memory() -> Memory:
        if broken:
            raise OSError("no /proc")
        return Memory(9, 5, 4, False)

    monkeypatch.setattr(module, "read_memory", memory)
    machine = started()
    deadline = time.monotonic() + 30
    while not machine.problem and time.monotonic() < deadline:
        time.sleep(0.02)
    assert machine.problem == "The machine cannot be read: no /proc." and machine.summary() == ""
    broken = False
    assert sampled(machine).memory == 5 and machine.problem == ""


def test_an_old_reading_is_not_the_present(
    started: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = started()
    sampled(machine)
    machine.stop()
    assert machine.last is not None
    monkeypatch.setattr(module, "STALE", 0.0)
    assert machine.last is None and machine.summary() == "" and machine.samples


# --- GPUs ---


class ScriptedNvml:
    """Two H100s in place of the driver; the errors are NVML's. `fails`: function → error code of
    its next calls.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: dict[str, int] = {}
        process = SimpleNamespace(pid=os.getpid(), usedGpuMemory=11 * GIB)
        answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, used=12 * GIB),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=40),
            "nvmlDeviceGetPowerUsage": 412_000,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetComputeRunningProcesses": [
                process,
                SimpleNamespace(pid=1, usedGpuMemory=None),
            ],
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, self._function(name, answer))

    def _function(self, name: str, answer: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            if name in self.fails:
                raise pynvml.NVMLError(self.fails[name])
            return answer

        return call


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> ScriptedNvml:
    return ScriptedNvml(monkeypatch)


@pytest.mark.usefixtures("nvml")
def test_gpus_are_read_beside_the_cpu(started: Callable[..., Machine]) -> None:
    machine = started(lambda: {"workbench": os.getpid()})
    sample = sampled(machine)
    assert (machine.name, machine.summary()) == ("2 × H100", "2 × H100 24/160 GiB")
    assert sample.gpus == ((0.97, 12 * GIB, 61, 412.0),) * 2
    assert sample.processes["workbench"].gpu_memory == 22 * GIB
    assert machine.gpu_problem == "" and sample.cpu is not None


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            "No NVIDIA GPU: its driver is not installed on this machine.",
        ),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "No NVIDIA GPU: its driver is not loaded."),
        (
            pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
            "The GPU cannot be read: the NVIDIA driver was updated. Reboot to load the new one.",
        ),
        (pynvml.NVML_ERROR_NO_PERMISSION, "The GPU cannot be read: Insufficient Permissions."),
    ],
    ids=["no-driver", "not-loaded", "mismatch", "permission"],
)
def test_a_driver_that_does_not_start_is_one_sentence(
    nvml: ScriptedNvml, started: Callable[..., Machine], code: int, sentence: str
) -> None:
    nvml.fails["nvmlInit"] = code
    machine = started()
    sample = sampled(machine)
    assert (machine.gpu_problem, machine.gpus, sample.gpus) == (sentence, [], ())
    assert machine.summary().startswith("cpu ")


def test_a_lost_gpu_is_said_until_it_is_back(nvml: ScriptedNvml) -> None:
    gpus = Gpus()
    for name in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates"):
        nvml.fails[name] = pynvml.NVML_ERROR_GPU_IS_LOST
    assert gpus.read() == ((None,) * 4,) * 2
    assert gpus.problem == (
        "GPU 0 (H100) cannot be read any more: GPU is lost. GPU 1 (H100) cannot be read any more: "
        "GPU is lost."
    )
    nvml.fails.clear()
    assert gpus.read()[0].load == 0.97 and gpus.problem == ""


@pytest.mark.usefixtures("nvml")
def test_a_machine_without_devices_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 0)
    gpus = Gpus()
    assert (gpus.read(), gpus.problem) == ((), "No NVIDIA GPU: the driver lists none.")


def test_what_a_gpu_does_not_tell_is_left_out(nvml: ScriptedNvml) -> None:
    nvml.fails["nvmlDeviceGetUtilizationRates"] = pynvml.NVML_ERROR_NOT_SUPPORTED  # a MIG slice
    nvml.fails["nvmlDeviceGetPowerUsage"] = pynvml.NVML_ERROR_NO_PERMISSION
    gpus = Gpus()
    assert gpus.read()[0] == (None, 12 * GIB, 61, None) and gpus.problem == ""


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H200 NVL", "H200"),
        ("", ""),
    ],
)
def test_a_gpus_name_is_short(name: str, short: str) -> None:
    assert short_name(name) == short
