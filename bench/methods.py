"""A training step of each method against PEFT's on the same checkpoint: time and memory.

MiniGPT's tensors are too small to show in resident memory, so `TensorMemoryMeter` counts the bytes
of all tensors alive at a step's peak, including weights and optimizer, on both sides. Our LoRA
holds more there than PEFT's: the folded weights of a block, in forward and again in backward
(docs/decisions/0003), and the flat gradient always.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from msgspec.structs import replace
from torch import Tensor

from bench.measure import Row, in_turns
from bench.methods_peft import peft_side
from bench.training import batches, minigpt
from pipeline.adapters.attach import attach
from pipeline.adapters.virtual import attach_virtual_tokens
from pipeline.models.load import load_base
from pipeline.project.params.sections import Quantization, Training
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.full import FinetuneFull
from pipeline.stages.methods.lora import FinetuneLora, lora_spec
from pipeline.stages.methods.prefix import FinetunePrefix
from pipeline.stages.methods.prompt import FinetunePrompt
from pipeline.training.loop import steps
from pipeline.training.memory.prediction import TensorMemoryMeter
from pipeline.training.task import TrainingTask, build_optimizer

STEPS, ROUNDS, VIRTUAL = 25, 9, 8
LORA = FinetuneLora(epochs=10**9, learning_rate=1e-3)
METHODS: dict[str, Training] = {
    "LoRA": LORA,
    "LoRA+": replace(LORA, loraplus_ratio=16.0),
    "DoRA": replace(LORA, dora=True),
    "PiSSA": replace(LORA, init_lora_weights="pissa"),
    "QLoRA (nf4-dq)": replace(LORA, quantization="nf4-dq"),
    "prefix": FinetunePrefix(epochs=10**9, virtual_tokens=VIRTUAL),
    "prompt": FinetunePrompt(epochs=10**9, virtual_tokens=VIRTUAL),
    "full": FinetuneFull(epochs=10**9),
}
MIN_SPEEDUP = {"LoRA": 2}


@dataclass(frozen=True)
class Side:
    """One method on one side: a step, and the tensors that persist between steps."""

    step: Callable[[], object]
    persistent: Callable[[], Iterable[Tensor]]

    def run_steps(self) -> None:
        for _ in range(STEPS):
            self.step()

    def peak(self) -> int:
        """Bytes of the tensors alive at a step's peak."""
        self.step()  # the first step creates the optimizer state
        live = TensorMemoryMeter()
        live.watch(self.persistent())
        with live:
            self.step()
        return live.peak


def methods() -> Iterator[Row]:
    """Steps of 4 windows of 4 tokens on MiniGPT, with one thread, which is faster for both."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        minigpt(Path(folder))
        for method, settings in METHODS.items():
            sides[method] = our_side(Path(folder), method, settings)
            sides[f"{method}, PEFT"] = Side(*peft_side(Path(folder), method, VIRTUAL))
        times = in_turns({name: side.run_steps for name, side in sides.items()}, ROUNDS)
    for method in METHODS:
        mine, other = times[method] / STEPS, times[f"{method}, PEFT"] / STEPS
        name = "transformers" if method == "full" else "PEFT"
        ratio, goal = other / mine, MIN_SPEEDUP.get(method, 1)
        yield Row(
            f"step, {method}",
            mine,
            f"{name}, {other * 1e3:.2f} ms",
            ratio,
            f"at least {goal} ×",
            ratio >= goal,
        )
        our_peak, peft_peak = sides[method].peak(), sides[f"{method}, PEFT"].peak()
        what = f"the same, tensors alive at its peak: {our_peak / 1e3:,.0f} kB"
        ratio = round(our_peak / peft_peak, 2)  # ignores a few bytes in 600 kB
        yield Row(what, 0, f"{name}, {peft_peak / 1e3:,.0f} kB", ratio, "at most 1 ×", ratio <= 1)


def our_side(folder: Path, method: str, settings: Any) -> Side:
    """The method as the pipeline stage sets it up."""
    quantization: Quantization = getattr(settings, "quantization", "none")
    model, tokenizer = load_base(folder, quantization=quantization)
    if isinstance(settings, FinetuneLora):
        attach(model, lora_spec(model, settings, ()), init=settings.init_lora_weights)
    elif isinstance(settings, FinetunePrefix | FinetunePrompt):
        attach_virtual_tokens(model, method, settings.virtual_tokens, len(tokenizer), settings.seed)
    optimizer = build_optimizer(model, settings)
    records = steps(TrainingTask.of_one(model.train(), batches(), settings, FULL), optimizer)
    return Side(
        lambda: next(records), lambda: [*model.parameters(), *model.buffers(), *optimizer.tensors()]
    )
