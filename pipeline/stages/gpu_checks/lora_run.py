"""A LoRA training on random weights, by this project's loop, for checks and benchmarks on a GPU."""

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import adapter_layers, attach
from pipeline.adapters.config import AdapterSpec
from pipeline.data.examples import IGNORED
from pipeline.data.masking import Encoded
from pipeline.data.windows import InMemoryDataset, as_window
from pipeline.models.quantized_linear import quantize
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.project.logs.run_log import Step
from pipeline.stages.methods.lora import FinetuneLora, Lora
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.memory.prediction import memory_meter, predicted_peak
from pipeline.training.task import TrainingTask, build_optimizer, prepare_model

RANK, LEARNING_RATE, MAX_GRAD_NORM = 16, 1e-4, 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASKED = 0.6  # the share of an example's tokens, its first ones, that have no labels
Example = tuple[list[int], list[int]]  # ids, labels


@dataclass(frozen=True)
class Case:
    """A model's config, and how it trains.

    An epoch has `steps` steps of `batch` examples, whose median is `length` tokens. Lengths vary as
    in instruction data.
    """

    name: str
    config: Mapping[str, Any]
    quantization: Literal["none", "int8", "nf4", "nf4-dq"] = "none"
    checkpointing: bool = False
    compiled: bool = False
    trains_embeddings: bool = False
    steps: int = 6
    batch: int = 16
    length: int = 400

    @property
    def longest(self) -> int:
        return 4 * self.length

    def examples(self) -> list[Example]:
        generator = torch.Generator().manual_seed(0)
        drawn = []
        for _ in range(self.steps * self.batch):
            size = torch.empty(1).log_normal_(math.log(self.length), 0.6, generator=generator)
            length = min(self.longest, max(8, int(size)))
            rows = self.config["vocab_size"]
            ids = torch.randint(5, rows, (length,), generator=generator).tolist()
            asked = int(ASKED * length)
            drawn.append((ids, [IGNORED] * asked + ids[asked:]))
        return drawn


class Peak(NamedTuple):
    """Bytes of tensors at the peak of an epoch."""

    predicted: int
    measured: int
    beside: str  # what else the device holds, to append to a sentence

    @property
    def error(self) -> float:
        return self.measured / self.predicted - 1 if self.predicted else math.inf


class LoraRun:
    """The training of `lora finetune lora`, step by step; a case has the same weights each time."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        with torch.device(device):
            self.model: TransformersModel = from_config(case.config, torch.bfloat16)
        if case.quantization != "none":
            quantize(self.model, case.quantization, None, device)
        saved = self.model.embedding_and_head if case.trains_embeddings else ()
        attach(self.model, AdapterSpec(RANK, 2 * RANK, TARGETS, saved=saved), torch.float32)
        windows = []
        self.tokens = self.labels = 0  # of an epoch
        for ids, labels in case.examples():
            learned = tuple(label != IGNORED for label in labels)
            windows.append(as_window(Encoded(tuple(ids), learned)))
            self.tokens += len(ids) - 1
            self.labels += sum(learned[1:])
        dataset = InMemoryDataset(windows, [""] * len(windows))
        settings = FinetuneLora(
            epochs=10**6,
            batch_size=case.batch,
            window=0,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            precision="bf16",
            gradient_checkpointing="full" if case.checkpointing else "none",
            quantization=case.quantization,
        )
        batches, counted = Batches(dataset, case.batch, None), Lora(RANK, 2.0 * RANK, TARGETS)
        self.task = TrainingTask.of_one(self.model, batches, settings, counted)
        prepare_model(self.model, settings.gradient_checkpointing, case.compiled)
        self.optimizer = build_optimizer(self.model, settings)
        self.steps = steps(self.task, self.optimizer)
        self.model.train()

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def adapter(self) -> list[nn.Parameter]:
        parameters: list[nn.Parameter] = []
        for _, layer in adapter_layers(self.model):
            parameters += layer.adapter_parameters().values()
        return parameters

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), *self.optimizer.tensors()]

    def step(self) -> Step:
        return next(self.steps)[0]

    def epoch(self) -> None:
        for _ in range(self.case.steps):
            self.step()

    def seconds_of_epoch(self) -> float:
        """The time until the device has finished an epoch."""
        synchronize(self.device)
        start = perf_counter()
        self.epoch()
        synchronize(self.device)
        return perf_counter() - start

    def peak(self) -> Peak:
        """The peak of an epoch, to be called after a first step, which makes the optimizer's state.

        Predicted is that of the largest step.
        """
        meter = memory_meter(self.device)
        largest = self.task.batches.largest_step(range(self.case.steps))
        predicted = predicted_peak(self.task, largest)
        gc.collect()  # a GPU's meter counts what an earlier run has left, too
        meter.watch(self.tensors())
        with meter:
            self.epoch()
        return Peak(predicted, meter.peak, meter.beside)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
