"""A step of LoRA, DoRA, prefix and prompt tuning on the model of bench/real.py against PEFT's, each
in a process.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Row
from bench.methods_peft import virtual_config
from bench.real import ask, base, side
from bench.real_sides import BATCH, RANK, TARGETS, Example, Ours, Theirs, equally_long
from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.virtual import attach_virtual_tokens

METHODS = ("LoRA", "DoRA", "prefix", "prompt")
TURNS, LENGTH, VIRTUAL, WORDS = 2, 32, 20, 5000


def methods_real() -> Iterator[Row]:
    """Steps of eight short examples in bf16, with rank 8 or 20 virtual tokens."""
    with base() as (folder, name):
        for method in METHODS:
            yield from _rows(method, folder, name)


def _rows(method: str, folder: Path, name: str) -> Iterator[Row]:
    with (
        side(partial(OurMethod, method), folder) as ours,
        side(partial(PeftMethod, method), folder) as theirs,
    ):
        # skips the warm-up
        turns = [(ask(theirs, "epoch"), ask(ours, "epoch")) for _ in range(TURNS + 1)][1:]
        other, mine = (median(times) for times in zip(*turns, strict=True))
        their_growth, our_growth = ask(theirs, "memory_growth"), ask(ours, "memory_growth")
    ratio = other / mine
    yield Row(
        f"step, {method}, {name}", mine, f"PEFT, {other:.2f} s", ratio, "at least 1 ×", ratio >= 1
    )
    what = f"the same, resident memory beyond the loaded model: {our_growth / 2**20:,.0f} MiB"
    reference, ratio = f"PEFT, {their_growth / 2**20:,.0f} MiB", our_growth / their_growth
    yield Row(what, 0, reference, ratio, "at most 1 ×", ratio <= 1)


class OurMethod(Ours):
    def __init__(self, method: str, folder: Path) -> None:
        self.method = method
        super().__init__(folder)

    def training_examples(self) -> list[Example]:
        return equally_long(BATCH, LENGTH)

    def attach(self, model: Any) -> None:
        if self.method in ("LoRA", "DoRA"):
            attach(
                model,
                AdapterSpec(RANK, 2 * RANK, TARGETS, dora=self.method == "DoRA"),
                torch.bfloat16,
                "kaiming",
            )
            return
        attach_virtual_tokens(model, self.method, VIRTUAL, WORDS, 0, torch.bfloat16)


class PeftMethod(Theirs):
    def __init__(self, method: str, folder: Path) -> None:
        self.method = method
        super().__init__(folder)

    def training_examples(self) -> list[Example]:
        return equally_long(BATCH, LENGTH)

    def add_adapter(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        self.optimizer = None
        if self.method in ("prefix", "prompt"):
            return get_peft_model(model, virtual_config(self.method, VIRTUAL))
        dora, targets = self.method == "DoRA", list(TARGETS)
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=RANK,
                lora_alpha=2 * RANK,
                target_modules=targets,
                use_dora=dora,
            ),
        )
