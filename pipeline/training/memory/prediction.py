"""Memory of a training step: the calculator's prediction, settings that would lower it, and meters
of its peak: the tensors alive, or on a GPU what CUDA's allocator counts anyway."""

import dataclasses
import os
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

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
from pipeline.errors import UserError
from pipeline.files.text import in_units
from pipeline.models.base import CausalLM
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.project.params.sections import AdapterTraining, Training
from pipeline.training.batches import Batch
from pipeline.training.losses import chunk_of, fuses_head


def suggest_less_memory(
    model: CausalLM, method: FinetuningMethod | None, settings: Training, batch: Batch, stage: str
) -> str:
    """A sentence with the predicted memory of a step on `batch` and of settings that need less.

    Settings that do not change the result come first, quantization last.
    """
    options: list[tuple[str, Training, Batch]] = []
    if settings.gradient_checkpointing != "full":
        options.append(
            (
                f"{stage}.gradient_checkpointing=full",
                replace(settings, gradient_checkpointing="full"),
                batch,
            )
        )
    if settings.batch_size > 1:
        sequences = settings.batch_size * settings.gradient_accumulation_steps
        single = longest_sequence(batch)
        options.append(
            (f"{stage}.batch_size=1 with gradient_accumulation_steps={sequences}", settings, single)
        )
    if isinstance(settings, AdapterTraining) and settings.quantization == "none":
        quantized = replace(settings, quantization="nf4-dq", precision="bf16")
        options.append((f"{stage}.quantization=nf4-dq", quantized, batch))
    now = predict_peak_memory(model, method, settings, batch)
    if now is None:
        return f"Lower {stage}.max_length{''.join(f' or set {option}' for option, *_ in options)}."
    predictions = [
        (option, predict_peak_memory(model, method, changed, read))
        for option, changed, read in options
    ]
    smaller = [
        f"{in_units(size)} with {option}" for option, size in predictions if size and size < now
    ]
    return (
        f"The calculator predicts {in_units(now)}; "
        f"{', '.join(smaller) or f'lower {stage}.max_length'}."
    )


def longest_sequence(batch: Batch) -> Batch:
    """A batch of only the longest sequence of `batch`."""
    longest = max(batch.unpack(), key=lambda part: part.ids.numel())
    if len(longest.ids) == 1:
        return longest
    # equal lengths: take the first sequence
    index, length = longest.label_index, longest.ids.shape[1]
    labels = slice(None, length) if index is None else (index < length).to(longest.labels.device)
    label_index = None if index is None else index[labels]
    return Batch(longest.ids[:1], longest.positions[:1], longest.labels[labels], label_index)


def predict_peak_memory(
    model: CausalLM,
    method: FinetuningMethod | None,
    settings: Training,
    batch: Batch,
    retained: bool = False,
    device: torch.device | None = None,
) -> int | None:
    """Predicted peak of a step on `batch`, in bytes of tensors; None if the calculator does not
    know the architecture, or the method.

    `retained`: whether the step computes the retention loss. `device`: where the model will be;
    default: where it is.
    """
    if method is None:
        return None
    moves = device is not None and device.type != model.device.type
    device = device or model.device
    rows, length = batch.ids.shape
    lengths = batch.segments or [length]
    lengths = [method.positions + n for n in lengths]
    # in a packed row a token attends to its own sequence only: on average Σn²/Σn keys
    span = round(sum(n * n for n in lengths) / sum(lengths)) if batch.segments else 0
    kept_weights = (
        model.kept_attention_weights(lengths) if method.short_attention and not moves else None
    )
    labels = len(batch.labels)
    chunk, retained_chunk = (
        chunk_rows(model.shape.rows) if moves else chunk_of(model, rows)
        for rows in (labels, batch.ids.numel())
    )
    all_logits = not batch.in_chunks and batch.label_index is None and labels <= chunk
    loss = "divergence" if retained else "full" if all_logits else "chunked"
    if not (retained or batch.in_chunks or moves) and fuses_head(model):
        loss = "fused"
    precision = str(settings.precision)
    adapter = getattr(settings, "adapter_precision", precision)
    if (quantization := getattr(settings, "quantization", "none")) != "none":
        if precision == "fp32":
            return None  # the calculator supports quantization with 16-bit compute only
        precision = quantization
    run = TrainingConfig(
        batch=rows,
        sequence=length,
        span=span,
        sequences=len(batch.segments or ()) or rows,
        scores=rows * (kept_weights or 0),
        attention="sdpa" if kept_weights is None else "short",
        precision=precision,
        adapter_precision=adapter,
        # on a CPU paged state is where all else is
        optimizer=settings.optimizer.removeprefix("paged-")
        if device.type == "cpu"
        else settings.optimizer,
        cpu=uses_cpu_kernels(device),
        native=model.trains_natively,
        neftune_alpha=0.0 if retained else settings.neftune_alpha,
        checkpointing=settings.gradient_checkpointing,
        loss=loss,
        label_share=1.0 if retained else labels / batch.ids.numel(),
        chunk=retained_chunk if retained else chunk,
    )
    if retained and hasattr(method, "lora_dropout"):  # without noise
        method = dataclasses.replace(method, lora_dropout=0.0)  # type: ignore[call-arg]
    try:
        return predict(architecture(model.describe(), "the model"), method, run).peak
    except UserError:
        return None


class MemoryMeter(Protocol):
    """Measures what runs inside its context. `peak`: bytes of tensors on one device; 0: nothing ran
    yet.
    """

    peak: int

    @property
    def beside(self) -> str:
        """What the device holds beside these tensors, to append to a sentence; empty if it is not
        measured.
        """

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these too, which were there before."""

    def __enter__(self) -> Any: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
        /,
    ) -> Any: ...


def memory_meter(device: torch.device) -> MemoryMeter:
    return CudaMemoryMeter(device) if device.type == "cuda" else TensorMemoryMeter(device)


class CudaMemoryMeter:
    """The allocator's own numbers, which cost nothing: also of what FSDP or a library allocates by
    itself.

    `reserved`: bytes that it has taken from the device, gaps between tensors included. `context`:
    bytes of the process there beside them, its CUDA context and kernels; 0: not known.
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
    """Bytes that this process uses on a GPU, its CUDA context included, as the driver counts them;
    0 if it does not say, as in a container, where the process has another number."""
    import pynvml  # a run on a CPU does not load it

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return next((one.usedGpuMemory for one in processes if one.pid == os.getpid()), 0) or 0
    except (pynvml.NVMLError, AttributeError):
        return 0


class TensorMemoryMeter(TorchDispatchMode):
    """Inside the context, sums the sizes of all live storages, rounded as CUDA's allocator does;
    `peak` is the maximum.

    With `device` only of tensors there: a paged optimizer's state is elsewhere. Results are bit for
    bit the same; each operation takes some microseconds longer.
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
                # no reference, which would keep it alive
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler, which takes 1.4 seconds; nothing here is
        compiled.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])
        return out
