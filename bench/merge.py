"""A streaming merge, and the same as GGUF, against a copy of the same files and PEFT's merge, each
in its own process.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Row
from bench.real import ROUNDS, ask, side
from bench.real_sides import resident, seconds
from pipeline.weights.merge import Merging, merge_into
from pipeline.weights.merge_check import check_merge
from pipeline.weights.merge_plan import plan_merge

SHARD, RANK = "400MB", 16
BASE, ADAPTER = "base", "adapter"


def merge() -> Iterator[Row]:
    """In every turn, each of them writes the files again from a base in the page cache."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _save_models(folder)
        files = sorted((folder / BASE).glob("*.safetensors"))
        with (
            side(Ours, folder) as ours,
            side(Copy, folder) as copy,
            side(Theirs, folder) as theirs,
            side(F16, folder) as f16,
            side(Q8, folder) as q8,
        ):
            sides = (ours, copy, theirs, f16, q8)
            turns = [[ask(pipe, "write") for pipe in sides] for _ in range(ROUNDS + 1)][1:]
            columns = [[*column] for column in zip(*turns, strict=True)]
            mine, least, other = (median(times) for times in columns[:3])
            peak, theirs_peak = ask(ours, "peak"), ask(theirs, "peak")
        what = (
            f"merge of {sum(file.stat().st_size for file in files) / 1e9:.2f} GB in {len(files)} "
            "files, measured too"
        )
    copied, goal = f"cp -r, {least:.2f} s", "at most 1.4 ×"
    yield Row(what, mine, copied, mine / least, goal, mine <= 1.4 * least)
    reference = f"PEFT: open, merge_and_unload, save, {other:.2f} s"
    yield Row("the same", mine, reference, other / mine, "at least 1.5 ×", other >= 1.5 * mine)
    what, reference = (
        f"the same, {peak / 2**20:,.0f} MiB resident at the peak",
        f"PEFT, {theirs_peak / 2**20:,.0f} MiB",
    )
    yield Row(what, 0, reference, peak / theirs_peak, "at most 0.4 ×", peak <= 0.4 * theirs_peak)
    for kind, times in zip((F16.kind, Q8.kind), columns[3:], strict=True):
        made, most = median(times), 4
        what, goal = f"the same as GGUF in {kind}, measured too", f"at most {most} ×"
        yield Row(what, made, copied, made / least, goal, made <= most * least)


def _save_models(folder: Path) -> None:
    """A sharded bf16 base, and a PEFT adapter on all of its linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / BASE, max_shard_size=SHARD)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear")
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(folder / ADAPTER)


class Writer:
    """Writes a checkpoint into an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.base, self.adapter, self.out = (
            folder / BASE,
            folder / ADAPTER,
            folder / type(self).__name__,
        )

    def write(self) -> float:
        """Seconds of `fill`; then removes the output, so that no writeback disturbs the next
        turn.
        """
        elapsed = seconds(self.fill)
        shutil.rmtree(self.out)
        return elapsed

    def fill(self) -> None:
        raise NotImplementedError

    def peak(self) -> int:
        """Peak resident bytes of the process, including the libraries."""
        return resident("VmHWM")


class Copy(Writer):
    def fill(self) -> None:
        subprocess.run(["cp", "-r", self.base, self.out], check=True)


class Ours(Writer):
    """As `lora merge --adapter`: writes the weights, and measures each update in what it wrote."""

    def fill(self) -> None:
        self.out.mkdir()
        list(merge_into(self.out, Merging(self.base, self.adapter)))


class F16(Writer):
    """As `lora export --format gguf`, without the vocabulary and the comparison with llama.cpp."""

    kind = "f16"

    def fill(self) -> None:
        from pipeline.export.gguf.writer import describe_model, write_files, written_matrices

        self.out.mkdir()
        path = self.out / "model.gguf"
        merge = plan_merge(self.base, self.adapter)
        model = describe_model(merge)
        list(write_files({path: self.kind}, model, {}))
        list(check_merge(merge, written_matrices(path, model), ""))


class Q8(F16):
    kind = "q8_0"


class Theirs(Writer):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import peft
        import transformers

        self.models: Any = transformers.AutoModelForCausalLM
        self.adapted: Any = peft.PeftModel

    def fill(self) -> None:
        model = self.models.from_pretrained(self.base, dtype=torch.bfloat16)
        merged = self.adapted.from_pretrained(model, self.adapter).merge_and_unload()
        merged.save_pretrained(self.out, max_shard_size=SHARD)
