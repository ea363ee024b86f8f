"""A training step of each method beside PEFT's on the same checkpoint: time, and what a step holds in memory.

MiniGPT is so small that its tensors vanish in a process's resident memory. So its memory is the bytes of all tensors
that are alive at a step's peak, weights and optimizer included, counted on both sides by `TensorMemoryMeter`.
LoRA there holds more than PEFT's: each small linear's folded weight lives until backward (docs/decisions/0003), and the
gradients, which are one vector, always.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bench.measure import Row, in_turns
from bench.methods_peft import peft_of
from bench.training import batches, minigpt
from pipeline.adapters.attach import attach
from pipeline.adapters.peft.virtual_tokens import VirtualSpec, attach_virtual_tokens
from pipeline.calc.settings import FULL
from pipeline.models.load import load_base
from pipeline.project.params.sections import FinetuneFull, FinetuneLora, FinetuneVirtual, Quantization, Training
from pipeline.stages.finetune import lora_spec
from pipeline.training.loop import TrainingTask, optimizer_of, steps
from pipeline.training.memory.live_bytes import TensorMemoryMeter

STEPS, ROUNDS, VIRTUAL = 25, 9, 8
LORA = FinetuneLora(epochs=10**9, learning_rate=1e-3)
METHODS: dict[str, Training] = {
    "LoRA": LORA,
    "LoRA+": replace(LORA, loraplus_ratio=16.0),
    "DoRA": replace(LORA, dora=True),
    "PiSSA": replace(LORA, init_lora_weights="pissa"),
    "QLoRA (nf4-dq)": replace(LORA, quantization="nf4-dq"),
    "prefix": FinetuneVirtual(epochs=10**9, virtual_tokens=VIRTUAL),
    "prompt": FinetuneVirtual(epochs=10**9, virtual_tokens=VIRTUAL),
    "full": FinetuneFull(epochs=10**9),
}


@dataclass(frozen=True)
class Side:
    """One method here or there: a step of it, and every tensor that it keeps from step to step."""

    step: Callable[[], object]
    held: Callable[[], Iterable[Tensor]]

    def many(self) -> None:
        for _ in range(STEPS):
            self.step()

    def peak(self) -> int:
        """Bytes of tensors alive at a step's peak."""
        self.step()  # the first makes the optimizer's state
        live = TensorMemoryMeter()
        live.watch(self.held())
        with live:
            self.step()
        return live.peak


def methods() -> Iterator[Row]:
    """Steps of 4 windows of 4 tokens on MiniGPT; one thread each, which is the faster for both."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        minigpt(Path(folder))
        for method, settings in METHODS.items():
            sides[method] = ours_of(Path(folder), method, settings)
            sides[f"{method}, PEFT"] = Side(*peft_of(Path(folder), method, VIRTUAL))
        times = in_turns({name: side.many for name, side in sides.items()}, ROUNDS)
    for method in METHODS:
        mine, other = times[method] / STEPS, times[f"{method}, PEFT"] / STEPS
        name = "transformers" if method == "full" else "PEFT"
        ratio = other / mine
        yield Row(f"step, {method}", mine, f"{name}, {other * 1e3:.2f} ms", ratio, "at least 1 ×", ratio >= 1)
        held, theirs = sides[method].peak(), sides[f"{method}, PEFT"].peak()
        what = f"the same, tensors alive at its peak: {held / 1e3:,.0f} kB"
        ratio = round(held / theirs, 2)  # one number more or less in 600 kB is none
        yield Row(what, 0, f"{name}, {theirs / 1e3:,.0f} kB", ratio, "at most 1 ×", ratio <= 1)


def ours_of(folder: Path, method: str, settings: Any) -> Side:
    """The method as the pipeline's stage sets it up."""
    kept: Quantization = getattr(settings, "quantization", "none")
    model, tokenizer = load_base(folder, quantization=kept)
    if isinstance(settings, FinetuneLora):
        attach(model, lora_spec(model, settings, ()), init=settings.init_lora_weights)
    elif isinstance(settings, FinetuneVirtual):
        attach_virtual_tokens(model, VirtualSpec(method, settings.virtual_tokens), len(tokenizer), settings.seed)
    optimizer = optimizer_of(model, settings)
    records = steps(TrainingTask(model.train(), batches(), settings, FULL), optimizer)
    return Side(lambda: next(records), lambda: [*model.parameters(), *model.buffers(), *optimizer.tensors()])
