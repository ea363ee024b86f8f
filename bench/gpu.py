"""On a CUDA GPU: LoRA and QLoRA at Qwen3's shapes with random weights, beside PEFT with
transformers' Trainer, TRL without padding, and Unsloth where it is installed.

`python -m bench gpu` needs no downloads, except that TRL gets flash attention from the Hub where
`kernels` is installed and `flash-attn` is not. With `liger-kernel` installed all but Unsloth, which
has kernels of its own, use it. Never run on a GPU are TRL with flash attention and Unsloth. Lengths
are ragged, as in instruction data, and the first 60% of an example are its prompt. Model FLOPs
utilization: 4N per token for frozen weights, plus attention's scores (Kaplan et al. 2020, §2;
`pipeline/calc/time.py`), per second, over the card's dense 16-bit peak
(`pipeline/calc/presets/gpus.json`). What checkpointing recomputes does not count as useful.
"""

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bench.measure import Row
from bench.peers import sft_trainer, unused_tokenizer
from bench.real import ask
from bench.real_sides import ARGUMENTS, pad_batch, seconds_of
from pipeline.calc.families import architecture
from pipeline.calc.fit import Gpu, gpus
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.sources.open_model import entry
from pipeline.calc.time import flops_per_token
from pipeline.files.text import in_units
from pipeline.models.generate import generate
from pipeline.stages.gpu_checks.lora_run import RANK, TARGETS, Case, LoraRun, synchronize
from pipeline.stages.methods.lora import Lora

ROUNDS = 3
NEW_TOKENS = 128


def gpu() -> Iterator[Row]:
    """Skipped where there is no GPU."""
    if not torch.cuda.is_available():
        print("gpu: no CUDA GPU here, so nothing is measured")
        return
    device, small, large = (
        torch.device("cuda"),
        entry("qwen3-0.6b")["config"],
        entry("qwen3-8b")["config"],
    )
    memory = torch.cuda.mem_get_info()[1] / 2**30
    cases = [
        Case("Qwen3-0.6B, LoRA", small),
        Case("Qwen3-0.6B, QLoRA", small, quantization="nf4-dq"),
    ]
    cases += [Case("Qwen3-0.6B, LoRA, compiled", small, compiled=True)]
    if memory > 45:
        cases.append(Case("Qwen3-8B, LoRA", large, checkpointing=True))
    if memory > 20:
        cases.append(Case("Qwen3-8B, QLoRA", large, quantization="nf4-dq", checkpointing=True))
    for case in cases:
        yield from measure(case, device, known_gpu(torch.cuda.get_device_name(), memory))


def known_gpu(name: str, gib: float) -> Gpu | None:
    """The card of that name, as the driver has it, whose memory is the nearest; None if its peak is
    not published.
    """
    words = set(re.split(r"[ -]", name))

    def named(gpu: Gpu) -> bool:
        return any(
            set(one.split()) <= words for one in re.sub(r" \d+ GB", "", gpu.label).split(" / ")
        )

    same = [gpu for gpu in gpus().values() if gpu.tflops and named(gpu)]
    return min(same, key=lambda gpu: abs(gpu.bytes / 2**30 - gib), default=None)


def measure(case: Case, device: torch.device, card: Gpu | None) -> Iterator[Row]:
    """All rows of a case. Ours is measured alone first, then in turns with each of the others."""
    ours = Ours(case, device)
    first = timed(ours.step, device)
    warm = [timed(ours.step, device) for _ in range(case.steps - 1)]
    if case.compiled:
        what = f"{case.name}: first step, with what is compiled"
        yield Row(what, first, f"later ones, {median(warm) * 1e3:.0f} ms", None, "", True)
    peak = ours.peak()
    what = f"{case.name}: peak of an epoch, {in_units(peak.measured)}{peak.beside}"
    yield Row(
        what,
        0,
        f"predicted, {in_units(peak.predicted)}",
        1 + peak.error,
        "within 5%",
        abs(peak.error) <= 0.05,
    )

    for kind in (Theirs, Trl):
        theirs = kind(case, device)
        yield from _beside(ours, theirs, card, peak.measured)
        if kind is Theirs and not case.compiled:
            yield _generation(ours, theirs)
        del theirs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if find_spec("unsloth") is not None:
        with unsloth(case, device) as side:
            yield from _beside(ours, side, card, peak.measured)
    swap = median(timed(ours.swap, device) for _ in range(5))
    yield Row(f"{case.name}: another adapter's weights from the host", swap, "", None, "", True)


def _beside(
    ours: "Ours", theirs: "Theirs | UnslothProcess", card: Gpu | None, peak: int
) -> Iterator[Row]:
    """Time of an epoch, in turns, and where there is a GPU its memory."""
    case = ours.case
    turns = [(theirs.epoch(), ours.seconds_of_epoch()) for _ in range(ROUNDS + 1)][1:]
    other, mine = (median(times) for times in zip(*turns, strict=True))
    speed, share = ours.tokens / mine, ours.utilization(mine, card)
    what = f"{case.name}: epoch, {speed:,.0f} tokens/s, {share}"
    reference = f"{theirs.name}, {ours.tokens / other:,.0f} tokens/s"
    yield Row(what, mine, reference, other / mine, "at least 1 ×", other >= mine)
    if ours.device.type == "cuda":
        other_peak = theirs.peak()
        ratio, reference = peak / other_peak, f"{theirs.name}, {in_units(other_peak)}"
        yield Row(f"{case.name}: the same peak", 0, reference, ratio, "at most 1 ×", ratio <= 1)


def _generation(ours: "Ours", theirs: "Theirs") -> Row:
    device = ours.device
    pairs = [(timed(theirs.generate, device), timed(ours.generate, device)) for _ in range(ROUNDS)]
    other, mine = (median(times) for times in zip(*pairs, strict=True))
    what = f"{ours.case.name}: {NEW_TOKENS} new tokens, {NEW_TOKENS / mine:,.0f} a second"
    reference = f"model.generate, {NEW_TOKENS / other:,.0f} a second"
    return Row(what, mine, reference, other / mine, "at least 1 ×", other >= mine)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    synchronize(device)
    start = perf_counter()
    run()
    synchronize(device)
    return perf_counter() - start


class Ours(LoraRun):
    """What is measured beside training."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.other = [torch.zeros_like(p, device="cpu") for p in self.adapter()]
        if device.type == "cuda":
            self.other = [tensor.pin_memory() for tensor in self.other]

    def utilization(self, seconds: float, card: Gpu | None) -> str:
        if card is None or card.tflops is None:
            return "card without a published peak"
        length, share = (
            self.tokens // (self.case.steps * self.case.batch),
            self.labels / self.tokens,
        )
        run = TrainingConfig(
            sequence=length, checkpointing="none", loss="chunked", label_share=share
        )
        flops = flops_per_token(
            architecture(self.case.config, self.case.name), self.task.method or Lora(), run
        ).total
        return f"{flops * self.tokens / seconds / (card.tflops * 1e12):.0%} of {card.label}'s peak"

    @torch.no_grad()
    def swap(self) -> None:
        """Both ways, so that training goes on with its own."""
        for mine, other in zip(self.adapter(), self.other, strict=True):
            mine.copy_(other, non_blocking=True)

    def generate(self) -> None:
        self.model.eval()
        list(generate(self.model, list(range(5, 17)), (), NEW_TOKENS))
        self.model.train()


def training_options(case: Case, device: torch.device) -> dict[str, Any]:
    """Of transformers' TrainingArguments."""
    return ARGUMENTS | {
        "per_device_train_batch_size": case.batch,
        "use_cpu": device.type == "cpu",
        "use_liger_kernel": device.type == "cuda" and find_spec("liger_kernel") is not None,
        "gradient_checkpointing": case.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }


class Theirs:
    """PEFT and Trainer as in their documentation: bf16, SDPA, a collator that pads; Liger where it
    is installed.
    """

    name = "PEFT + Trainer"

    def __init__(self, case: Case, device: torch.device) -> None:
        from peft import LoraConfig, get_peft_model

        self.case, self.device = case, device
        self.held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.options = training_options(case, device)
        self.name += " + Liger" * self.options["use_liger_kernel"]
        with torch.device(device):
            config = AutoConfig.for_model(**case.config)
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=self.attention()
            )
        if case.quantization != "none":
            _quantize_by_bitsandbytes(model, device)
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS)
        )
        self.model = get_peft_model(model, lora)
        self.optimizer: Any = None

    def attention(self) -> str:
        return "sdpa"

    def trainer(self) -> Any:
        from transformers import Trainer, TrainingArguments

        data = [{"input_ids": ids, "labels": labels} for ids, labels in self.case.examples()]
        arguments, optimizers = TrainingArguments(**self.options), (self.optimizer, None)
        return Trainer(self.model, arguments, pad_batch, data, optimizers=optimizers)

    def epoch(self) -> float:
        trainer = self.trainer()
        synchronize(self.device)
        seconds = seconds_of(trainer, lambda: synchronize(self.device))
        self.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        return seconds

    def peak(self) -> int:
        """Bytes of an epoch beyond what the other side holds."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self.epoch()
        return torch.cuda.max_memory_allocated(self.device) - self.held

    def generate(self) -> None:
        prompt = torch.arange(5, 17, device=self.device)[None]
        options = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        self.model.eval().generate(input_ids=prompt, **options)
        self.model.train()


class Trl(Theirs):
    """TRL's SFTTrainer without padding: the examples of a batch end to end, as its packing lays
    them, in the batches of the others.
    """

    name = "TRL without padding"

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.name += f", {self.attention()}"
        self.sft = sft_trainer(self.model, case.examples(), self.options)

    def attention(self) -> str:
        """Flash attention where it is installed; `kernels` downloads it."""
        if self.device.type == "cuda" and find_spec("flash_attn") is not None:
            return "flash_attention_2"
        if self.device.type == "cuda" and find_spec("kernels") is not None:
            return "kernels-community/flash-attn2"
        return "sdpa"

    def trainer(self) -> Any:
        return self.sft


class UnslothProcess:
    """Unsloth in its own process, at the other end of `pipe`."""

    name = "Unsloth"

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def epoch(self) -> float:
        return ask(self.pipe, "epoch")

    def peak(self) -> int:
        return int(ask(self.pipe, "peak"))


@contextmanager
def unsloth(case: Case, device: torch.device) -> Iterator[UnslothProcess]:
    """It loads a model from a folder: random weights, which are saved for it."""
    with TemporaryDirectory() as folder:
        with torch.device(device):
            config = AutoConfig.for_model(**case.config)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        unused_tokenizer().save_pretrained(folder)
        del model
        pipe, other_end = Pipe()
        descriptor = other_end.fileno()
        command = [sys.executable, "-m", "bench.gpu_unsloth", str(descriptor), folder]
        with subprocess.Popen(command, pass_fds=[descriptor]) as process:
            other_end.close()  # so that recv ends if the process dies
            try:
                pipe.send(case)
                yield UnslothProcess(pipe)
                pipe.send(None)
            finally:
                pipe.close()
                process.terminate()


def _quantize_by_bitsandbytes(model: Any, device: torch.device) -> None:
    """Its own layers in place of the blocks' linears, as from_pretrained makes them from files."""
    library: Any = import_module("bitsandbytes")

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            shape = linear.in_features, linear.out_features, linear.bias is not None
            layer: Any = library.nn.Linear4bit(
                *shape, torch.bfloat16, quant_type="nf4", device="meta"
            )
            weight = linear.weight.data.cpu()
            layer.weight = library.nn.Params4bit(
                weight, False, quant_type="nf4", compress_statistics=True
            )
            layer.bias = linear.bias
            model.model.set_submodule(name, layer.to(device))
    model.is_loaded_in_4bit = True  # PEFT asks for it
