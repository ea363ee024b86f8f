"""QLoRA on the model of bench/real.py against PEFT with bitsandbytes: NF4 linears, the rest in
bf16.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Row
from bench.real import ROUNDS, ask, base, side
from bench.real_sides import BATCH, Example, Ours, Theirs, equally_long
from pipeline.models.quantized_linear import quantize

STEPS, LENGTH = 2, 64


def quantized() -> Iterator[Row]:
    """Steps of eight examples of equal length without a prompt, so neither side pads or masks
    labels.
    """
    with (
        base() as (folder, name),
        side(OurQLoRA, folder) as ours,
        side(PeftQLoRA, folder) as theirs,
    ):
        turns = [(ask(theirs, "epoch"), ask(ours, "epoch")) for _ in range(ROUNDS + 1)][1:]
        other, mine = (median(times) / STEPS for times in zip(*turns, strict=True))
        their_growth, our_growth = ask(theirs, "memory_growth"), ask(ours, "memory_growth")
    what, reference = f"QLoRA step, {name}", f"PEFT and bitsandbytes, {other:.2f} s"
    yield Row(what, mine, reference, other / mine, "at least 2 ×", other / mine >= 2)
    what = (
        f"the same, resident memory beyond the loaded model: {our_growth / 2**20:,.0f} MiB at the "
        "peak"
    )
    reference = f"PEFT and bitsandbytes, {their_growth / 2**20:,.0f} MiB"
    yield Row(
        what,
        0,
        reference,
        our_growth / their_growth,
        "at most 0.7 ×",
        our_growth / their_growth <= 0.7,
    )


class OurQLoRA(Ours):
    def training_examples(self) -> list[Example]:
        return equally_long(STEPS * BATCH, LENGTH)

    def load_base(self, folder: Path) -> Any:
        model = super().load_base(folder)
        quantize(model, "nf4-dq", None, torch.device("cpu"))
        return model


class PeftQLoRA(Theirs):
    def training_examples(self) -> list[Example]:
        return equally_long(STEPS * BATCH, LENGTH)

    def load_base(self, folder: Path) -> Any:
        """Without PEFT's prepare_model_for_kbit_training, which would cast embeddings and head to
        fp32.
        """
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=four_bit
        )
