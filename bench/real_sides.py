"""The two sides of bench/real.py, each in its own process so that they do not affect each other's
memory.

A side receives orders through a pipe, and uses no CPU between them.
"""

import math
import os
import re
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typing_extensions import override

from pipeline.adapters.attach import adapter_layers, attach
from pipeline.adapters.config import AdapterSpec
from pipeline.data.masking import Encoded
from pipeline.data.windows import InMemoryDataset, as_window
from pipeline.models.generate import generate
from pipeline.models.transformers_model import load_pretrained
from pipeline.project.params.sections import Training
from pipeline.stages.methods.lora import Lora
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.task import TrainingTask

BATCH, RANK, LEARNING_RATE, CLIP = 8, 8, 2e-4, 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
NEW_TOKENS = 128
Example = tuple[list[int], list[int]]  # ids, labels (-100: ignored)


def examples(count: int, seed: int) -> list[Example]:
    """Lognormal lengths, 12 to 300 tokens with median 70; the first 60% are the prompt. Low ids are
    most frequent.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_examples = []
    for _ in range(count):
        drawn = torch.empty(1).log_normal_(math.log(70), 0.6, generator=generator).item()
        length = min(300, max(12, int(drawn)))
        ids = (torch.empty(length).exponential_(0.02, generator=generator).int() + 500).tolist()
        prompt = int(0.6 * length)
        drawn_examples.append((ids, [-100] * prompt + ids[prompt:]))
    return drawn_examples


def equally_long(count: int, length: int) -> list[Example]:
    """Examples of `length` labels without a prompt, so neither side pads or masks labels."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(500, 5000, (count, length + 1), generator=generator).tolist()
    return [(ids, ids) for ids in drawn]


def serve(pipe: Connection, side: Callable[[Path], object], folder: Path, threads: int) -> None:
    """Main loop of a side's process: sends the result of each method whose name it receives, until
    None.
    """
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    instance = side(folder)
    for order in iter(pipe.recv, None):
        pipe.send(getattr(instance, order)())


class Side:
    """Common to both sides: data, held-out loss, memory."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.train, self.held_out = folder, self.training_examples(), examples(16, 1)
        self.model = self.add_adapter(self.load_base(folder))
        self.idle = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory

    def training_examples(self) -> list[Example]:
        return examples(32, 0)

    def load_base(self, folder: Path) -> Any:
        """The frozen base."""
        raise NotImplementedError

    def add_adapter(self, model: Any) -> Any:
        """The model with LoRA, ready for training."""
        raise NotImplementedError

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (T, V) of one sequence of ids (1, T)."""
        raise NotImplementedError

    def memory_growth(self) -> int:
        """Peak resident bytes beyond those of the loaded model."""
        return resident("VmHWM") - self.idle

    @torch.no_grad()
    def loss(self) -> float:
        """Mean cross-entropy over the held-out labels, one example at a time, in fp32."""
        total, count = 0.0, 0
        for ids, labels in self.held_out:
            logits = self.logits(torch.tensor([ids]))[:-1]
            targets = torch.tensor(labels[1:])
            total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            count += int((targets != -100).sum())
        return total / count


ARGUMENTS = {  # of transformers' Trainer, for an epoch in the order of the data
    "output_dir": "unused",
    "num_train_epochs": 1,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": CLIP,
    "bf16": True,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


def seconds_of(trainer: Any, finish: Callable[[], None] = lambda: None) -> float:
    """Seconds of the steps of an epoch of transformers' Trainer, without its setup. `finish` waits
    for the device.
    """
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = self.started or perf_counter()

    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    finish()
    trainer.remove_callback(clock)
    return perf_counter() - clock.started


class Theirs(Side):
    """PEFT and Trainer as in their documentation: bf16, and a collator that pads to the longest
    sequence.
    """

    def load_base(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def add_adapter(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS)
        )
        self.optimizer: torch.optim.Optimizer | None = None
        return get_peft_model(model, config)

    def logits(self, ids: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return out

    def collator(self) -> Callable[..., Any]:
        """Makes a batch of examples."""
        return pad_batch

    def trainer(self) -> Any:
        from transformers import Trainer, TrainingArguments

        data = [{"input_ids": ids, "labels": labels} for ids, labels in self.train]
        arguments = TrainingArguments(per_device_train_batch_size=BATCH, **ARGUMENTS)
        optimizers = self.optimizer, None
        return Trainer(self.model, arguments, self.collator(), data, optimizers=optimizers)

    def epoch(self) -> float:
        trainer = self.trainer()
        seconds = seconds_of(trainer)
        self.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        return seconds

    def generate(self) -> float:
        if not hasattr(self, "plain"):
            self.plain = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16)
        options = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        return seconds(lambda: self.plain.generate(_prompt(), **options))


class InOrder(Batches):
    """Batches without shuffling, as on the other side."""

    @override  # of a private method: a rename is found by mypy
    def _shuffle(self, epoch: int) -> list[int]:
        return list(range(len(self.dataset)))


class Ours(Side):
    """This project's model, adapter, batches and loop, as in `lora finetune lora`."""

    def load_base(self, folder: Path) -> Any:
        return load_pretrained(folder, torch.bfloat16)

    def add_adapter(self, model: Any) -> Any:
        self.attach(model)
        model.prepare_cpu_training()
        task = self.task(model.train())
        self.steps, self.steps_per_epoch = steps(task, FlatOptimizer(model)), len(task.batches)
        return model

    def task(self, model: Any) -> TrainingTask:
        windows = InMemoryDataset(
            [as_window(encoded(example)) for example in self.train], [""] * len(self.train)
        )
        settings = Training(
            epochs=10**6,
            batch_size=BATCH,
            window=0,
            learning_rate=LEARNING_RATE,
            max_grad_norm=CLIP,
            precision="bf16",
        )
        return TrainingTask.of_one(model, InOrder(windows, BATCH, 0), settings, Lora())

    def attach(self, model: Any) -> None:
        attach(model, AdapterSpec(RANK, 2 * RANK, TARGETS), torch.bfloat16)
        for _, layer in adapter_layers(model):
            nn.init.kaiming_uniform_(layer.lora_A, math.sqrt(5))  # as PEFT initializes

    def epoch(self) -> float:
        return seconds(lambda: [next(self.steps) for _ in range(self.steps_per_epoch)])

    def logits(self, ids: Tensor) -> Tensor:
        return self.model.eval()(ids)[0]  # type: ignore[no-any-return]

    def products(self) -> float:
        """Seconds of an epoch's matrix products alone, at the rate measured now for the model's
        shapes.
        """
        rate = _matmul_rate(
            self.model, sum(len(ids) for ids, _ in self.train) * BATCH // len(self.train)
        )
        backbone = sum(module.weight.numel() for module in _linears(self.model.blocks))
        tokens = sum(len(ids) for ids, _ in self.train)
        labels = sum(sum(label != -100 for label in labels[1:]) for _, labels in self.train)
        head: int = self.model.head.weight.numel()
        return 4 * (backbone * tokens + head * labels) / rate

    def generate(self) -> float:
        if not hasattr(self, "plain"):
            self.plain = load_pretrained(self.folder, torch.bfloat16)
        return seconds(lambda: list(generate(self.plain, _prompt()[0].tolist(), (), NEW_TOKENS)))


def encoded(example: Example) -> Encoded:
    ids, labels = example
    return Encoded(tuple(ids), tuple(label != -100 for label in labels))


def pad_batch(batch: Iterable[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pads as DataCollatorForSeq2Seq(tokenizer) does, without a tokenizer."""
    pad = nn.utils.rnn.pad_sequence
    ids = [torch.tensor(row["input_ids"]) for row in batch]
    return {
        "input_ids": pad(ids, True, 0),
        "attention_mask": pad([torch.ones_like(row) for row in ids], True, 0),
        "labels": pad([torch.tensor(row["labels"]) for row in batch], True, -100),
    }


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _matmul_rate(model: Any, tokens: int) -> float:
    """FLOPs per second of one block's products with `tokens` rows, forward and backward to the
    input.
    """
    linears = _linears(model.blocks[0])
    rows = {
        size: torch.randn(tokens, size, dtype=torch.bfloat16)
        for linear in linears
        for size in linear.weight.shape
    }

    def run() -> None:
        with torch.no_grad():
            for linear in linears * 4:
                F.linear(rows[linear.in_features], linear.weight)
                rows[linear.out_features] @ linear.weight

    run()
    return (
        16
        * tokens
        * sum(linear.weight.numel() for linear in linears)
        / median(seconds(run) for _ in range(9))
    )


def _prompt() -> Tensor:
    return torch.tensor([examples(1, 2)[0][0][:12]])


def seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def resident(what: str) -> int:
    """Bytes of the field `what` in /proc/PID/status."""
    match = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
