"""The peak memory of a training step: predicted by the calculator, and measured."""

import dataclasses
import gc
import os
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.method import FinetuningMethod
from pipeline.calc.settings import CONTEXT, TrainingConfig, chunk_rows
from pipeline.calc.tape import ROUNDING
from pipeline.errors import UserError, first_line
from pipeline.files.text import in_units
from pipeline.models.base import CausalLM
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.project.params.sections import AdapterTraining, Training
from pipeline.training.batches import Batch
from pipeline.training.losses import chunk_of, fuses_head
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.step import to_model_device
from pipeline.training.task import TrainingTask

T = TypeVar("T")


def suggest_less_memory(
    model: CausalLM,
    method: FinetuningMethod | None,
    settings: Training,
    batch: Batch,
    smallest: Batch,
    stage: str,
) -> str:
    """A sentence with the predicted memory of a step on `batch` and of settings that need less.

    Settings that do not change the result come first, quantization last. `smallest`: the longest
    example of `batch`, alone.
    """
    options: dict[str, tuple[Training, Batch]] = {}
    if settings.gradient_checkpointing != "full":
        checkpointed = replace(settings, gradient_checkpointing="full")
        options[f"{stage}.gradient_checkpointing=full"] = checkpointed, batch
    if (longest := smallest.ids.numel()) < batch.ids.numel():
        options[f"{stage}.tokens_per_batch={longest}"] = settings, smallest
    if isinstance(settings, AdapterTraining) and settings.quantization == "none":
        quantized = replace(settings, quantization="nf4-dq", precision="bf16")
        options[f"{stage}.quantization=nf4-dq"] = quantized, batch

    now = predict_peak_memory(model, method, settings, batch)
    if now is None:
        return " or set ".join([f"Lower {stage}.max_length", *options]) + "."
    predictions = []
    for option, (changed, read) in options.items():
        size = predict_peak_memory(model, method, changed, read)
        if size and size < now:
            predictions.append(f"{in_units(size)} with {option}")
    advice = ", ".join(predictions) or f"lower {stage}.max_length"
    return f"The calculator predicts {in_units(now)}; {advice}."


def predict_peak_memory(
    model: CausalLM,
    method: FinetuningMethod | None,
    settings: Training,
    batch: Batch,
    retained: bool = False,
    device: torch.device | None = None,
) -> int | None:
    """Predicted peak of a step on `batch` in bytes of tensors; None if the calculator cannot say.

    It does not know every architecture and method. `retained`: whether the step computes the
    retention loss. `device`: where the model will be; default: where it is.
    """
    if method is None:
        return None
    moves = device is not None and device.type != model.device.type
    device = device or model.device
    precision = str(settings.precision)
    adapter_precision = getattr(settings, "adapter_precision", precision)
    if (quantization := getattr(settings, "quantization", "none")) != "none":
        if precision == "fp32":
            return None  # the calculator supports quantization with 16-bit compute only
        precision = quantization

    rows, length = batch.ids.shape
    lengths = [method.positions + n for n in batch.segments or [length]]
    # in a packed row a token attends to its own sequence only: on average Σn²/Σn keys
    span = round(sum(n * n for n in lengths) / sum(lengths)) if batch.segments else 0
    short_attention = None
    if method.short_attention and not moves:
        short_attention = model.kept_attention_weights(lengths)

    labels = batch.ids.numel() if retained else len(batch.labels)
    chunk = chunk_rows(model.shape.rows) if moves else chunk_of(model, labels)
    loss = "chunked"
    if retained:
        loss = "divergence"
    elif not batch.in_chunks and not moves and fuses_head(model):
        loss = "fused"
    elif not batch.in_chunks and batch.label_index is None and labels <= chunk:
        loss = "full"

    optimizer = str(settings.optimizer)
    if device.type == "cpu":  # where paged state is where all else is
        optimizer = optimizer.removeprefix("paged-")
    run = TrainingConfig(
        batch=rows,
        sequence=length,
        span=span,
        sequences=len(batch.segments or ()) or rows,
        scores=rows * (short_attention or 0),
        attention="sdpa" if short_attention is None else "short",
        precision=precision,
        adapter_precision=adapter_precision,
        optimizer=optimizer,
        cpu=uses_cpu_kernels(device),
        native=model.trains_natively,
        neftune_alpha=0.0 if retained else settings.neftune_alpha,
        checkpointing=settings.gradient_checkpointing,
        loss=loss,
        label_share=labels / batch.ids.numel(),
        chunk=chunk,
    )
    if retained and hasattr(method, "lora_dropout"):  # without noise
        method = dataclasses.replace(method, lora_dropout=0.0)  # type: ignore[call-arg]
    try:
        return predict(architecture(model.describe(), "the model"), method, run).peak
    except UserError:
        return None


def predicted_peak(task: TrainingTask, number: int, device: torch.device | None = None) -> int:
    """Predicted peak of step `number` in bytes of tensors; 0 if the calculator does not know it.

    `device`: where the model will be; default: where it is.
    """
    model, retain = task.model, task.learners[0].retain
    batches = [(batch, False) for batch in to_model_device(model, task.batches[number])]
    if retain is not None:
        batches += [(batch, True) for batch in to_model_device(model, retain.batches[number])]
    sizes = [
        predict_peak_memory(model, task.method, task.settings, batch, retained, device)
        for batch, retained in batches
    ]
    return max((size for size in sizes if size), default=0)


class CudaMemoryMeter:
    """The allocator's own numbers, which cost nothing, also of what FSDP allocates by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = 0  # bytes of tensors; 0: nothing ran yet
        self.reserved = 0  # bytes taken from the device, gaps between tensors included
        # bytes of the process there beside them, its CUDA context and kernels; 0: not known
        self.context = 0

    @property
    def beside(self) -> str:
        """What the device holds beside the tensors, to append to a sentence."""
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
    """Bytes that this process uses on a GPU, its CUDA context included, as the driver counts them.

    0 if it does not say, as in a container, where the process has another number.
    """
    import pynvml  # a run on a CPU does not load it

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid():
                return process.usedGpuMemory or 0
    except (pynvml.NVMLError, AttributeError):
        pass
    return 0


class TensorMemoryMeter(TorchDispatchMode):
    """Inside the context, the sizes of all live storages, rounded as CUDA's allocator does.

    `device`: count tensors there alone: a paged optimizer's state is elsewhere. Results are bit for
    bit the same; each operation takes some microseconds longer.
    """

    beside = ""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these too, which were there before."""
        for tensor in tensors:
            if self._device is not None and tensor.device.type != self._device.type:
                continue
            storage = tensor.untyped_storage()  # a view adds nothing: it has its base's storage
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = -(-storage.nbytes() // ROUNDING) * ROUNDING
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)
                # no reference, which would keep it alive
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler, which takes 1.4 seconds and is not used here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])
        return out


MemoryMeter = CudaMemoryMeter | TensorMemoryMeter


def memory_meter(device: torch.device) -> MemoryMeter:
    return CudaMemoryMeter(device) if device.type == "cuda" else TensorMemoryMeter(device)


def measure_memory(
    meter: MemoryMeter, number: int, model: CausalLM, optimizer: FlatOptimizer, records: Iterator[T]
) -> Iterator[T]:
    """The same records; `meter` measures the step of record `number`, counted from 0.

    The first is never measured: it allocates the optimizer's state.
    """
    yield from islice(records, max(1, number))
    meter.watch([*model.parameters(), *model.buffers(), *optimizer.tensors()])
    with meter:
        measured = list(islice(records, 1))
    yield from measured
    yield from records


def release(error: BaseException) -> str:
    """Free the tensors of the step that failed; returns the error's first line.

    The frames of its traceback hold them, and a GPU has no room for the checkpoint until they are
    gone.
    """
    reason = first_line(error)
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__
    gc.collect()  # frames and autograd's contexts refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason
