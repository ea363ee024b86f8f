"""QLoRA on the model of bench/real.py beside PEFT with bitsandbytes: both on the same four bits, the rest in bf16."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Row
from bench.real import ROUNDS, ask, base, side
from bench.real_sides import BATCH, Example, Ours, Theirs, equally_long
from pipeline.models.quantization.quantized_linear import quantize

STEPS, LENGTH = 2, 64


def quantized() -> Iterator[Row]:
    """Steps of eight examples of one length, learned whole: nothing is padded and no label left out on either side."""
    with base() as (folder, name), side(Ours4, folder) as ours, side(Theirs4, folder) as theirs:
        turns = [(ask(theirs, "epoch"), ask(ours, "epoch")) for _ in range(ROUNDS + 1)][1:]
        other, mine = (median(times) / STEPS for times in zip(*turns, strict=True))
        grown, less = ask(theirs, "grown"), ask(ours, "grown")
    what, reference = f"QLoRA step, {name}", f"PEFT and bitsandbytes, {other:.2f} s"
    yield Row(what, mine, reference, other / mine, "at least 1.1 ×", other / mine >= 1.1)
    what = f"the same, resident memory beyond the loaded model: {less / 2**20:,.0f} MiB at the peak"
    reference = f"PEFT and bitsandbytes, {grown / 2**20:,.0f} MiB"
    yield Row(what, 0, reference, less / grown, "at most 0.7 ×", less / grown <= 0.7)


class Ours4(Ours):
    def taught(self) -> list[Example]:
        return equally_long(STEPS * BATCH, LENGTH)

    def frozen(self, folder: Path) -> Any:
        model = super().frozen(folder)
        quantize(model, "nf4-dq", None, torch.device("cpu"))
        return model


class Theirs4(Theirs):
    def taught(self) -> list[Example]:
        return equally_long(STEPS * BATCH, LENGTH)

    def frozen(self, folder: Path) -> Any:
        """Without PEFT's prepare_model_for_kbit_training, which would make embeddings and head fp32."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        four = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=four)
