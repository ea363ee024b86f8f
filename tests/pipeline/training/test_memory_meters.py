"""Memory on a GPU, as far as it shows without one: CUDA's allocator is a fake, and running out of
memory an error.
"""

import itertools
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from torch import Tensor

from cli.main import main
from pipeline.errors import UserError
from pipeline.files.text import in_units
from pipeline.models.base import CausalLM
from pipeline.training import loop, step
from pipeline.training.batches import Batch
from pipeline.training.memory.prediction import CudaMemoryMeter, TensorMemoryMeter, memory_meter
from pipeline.training.step import loss_of
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.projects import make

CUDA, MIB = torch.device("cuda", 0), 2**20


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that the fake allocator and driver report."""
    counts = {
        "max_memory_allocated": 300 * MIB,
        "max_memory_reserved": 400 * MIB,
        "memory_reserved": 390 * MIB,
    }
    for name in counts:
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: counts[name])

    def reset(_: torch.device) -> None:
        counts["max_memory_allocated"] = 100 * MIB

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34")
    )
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-12-34": "handle"}.__getitem__)
    processes = [
        SimpleNamespace(pid=1, usedGpuMemory=MIB),
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=850 * MIB),
    ]
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetComputeRunningProcesses", {"handle": processes}.__getitem__
    )
    return counts


def test_on_a_gpu_the_allocator_is_read_and_no_operation_is_watched(
    allocator: dict[str, int],
) -> None:
    meter = memory_meter(CUDA)
    assert isinstance(meter, CudaMemoryMeter) and isinstance(
        memory_meter(torch.device("cpu")), TensorMemoryMeter
    )
    with meter:
        allocator["max_memory_allocated"] += 20 * MIB
    assert (meter.peak, meter.reserved, meter.context) == (120 * MIB, 400 * MIB, 460 * MIB)
    assert meter.beside == "; 400.00 MiB reserved by the allocator, 460.00 MiB of CUDA context"


@pytest.mark.usefixtures("allocator")
def test_a_context_that_the_driver_does_not_tell_is_called_an_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a container the process has another number there; other drivers have no such table."""

    def missing(_: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    replies: list[Any] = [{"handle": []}.__getitem__, missing]
    for reply in replies:
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", reply)
        meter = CudaMemoryMeter(CUDA)
        with meter:
            pass
        assert meter.context == 0 and meter.beside.endswith(
            f"was not measured: {in_units(512 * MIB)} is an estimate"
        )


@pytest.mark.parametrize("number", [0, 3])
def test_a_failed_steps_tensors_are_freed_before_the_checkpoint_and_the_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A full GPU has no room for a checkpoint beside them: nothing of the error may hold them."""
    root, held, alive = (
        new_project(tmp_path / "p", FAMILIES["llama"]),
        list[weakref.ref[Tensor]](),
        dict[str, bool](),
    )
    make(root, ["pretrain", "expand_vocab"])
    count = itertools.count()

    def scarce(model: CausalLM, batch: Batch) -> Tensor:
        activations = torch.zeros(8)
        if next(count) == number:
            held.append(weakref.ref(activations))
            try:
                raise RuntimeError("a first try")
            except RuntimeError:
                raise torch.OutOfMemoryError(  # noqa: B904
                    "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."
                )
        return loss_of(model, batch)

    def noted(name: str) -> Any:
        original = getattr(loop, name)

        def call(*args: Any) -> Any:
            if held:
                alive[name] = held[0]() is not None
            return original(*args)

        return call

    monkeypatch.setattr(step, "loss_of", scarce)
    for name in ("write_checkpoint", "suggest_less_memory"):
        monkeypatch.setattr(loop, name, noted(name))
    with pytest.raises(
        UserError,
        match=r"out of memory in step \d+ \(CUDA out of memory\. Tried to allocate 2.00 GiB",
    ):
        make(root, ["finetune_lora"], ["finetune_lora.epochs=2"])
    assert alive == {"write_checkpoint": False, "suggest_less_memory": False}


@pytest.mark.parametrize("given", [None, "max_split_size_mb:64"])
def test_commands_let_cudas_allocator_extend_its_segments_unless_it_is_configured(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if given:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["lora", "--version"])
    monkeypatch.setattr("cli.main.app", lambda **_: None)
    main()
    expected = None if given else "expandable_segments:True"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
