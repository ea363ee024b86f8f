"""The checks of `lora doctor --gpu`: a function each, with what it expects and what to do if not.

A check yields its lines one by one, so that the report has those of a check that was cut short.
"""

import json
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch
from torch import Tensor

from pipeline.calc.sources.open_model import entry
from pipeline.errors import first_line, install_command, is_out_of_memory, missing_libraries
from pipeline.files.text import in_units
from pipeline.models import quantized_linear
from pipeline.models.base import CausalLM
from pipeline.models.device import available_memory, cores, device_info, fast_precision
from pipeline.models.generate import finite_id, next_tokens, read_side_by_side
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.pages import PagePool, SequenceCache
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.models.trial import try_kernels
from pipeline.project import process
from pipeline.project.logs.run_log import Step, read_steps
from pipeline.project.probes import held
from pipeline.project.provenance import version_of
from pipeline.stages.gpu_checks.lora_run import Case, LoraRun, Peak
from pipeline.training.parallel.launch import GRACE
from pipeline.training.task import prepare_model

CHECKS: "dict[str, Check]" = {}
REPORT = "Attach the report to an issue."
NOT_ENDED = f"The check did not come to its end. {REPORT}"
MAKE_ROOM = (
    "End what else uses the card (`nvidia-smi` lists it), or take a larger one, and run this again."
)


class Seen(NamedTuple):
    """A line of a check."""

    what: str  # was looked at
    text: str  # what was seen
    as_expected: bool | None = True  # None: it could not be tried here
    remedy: str = ""  # what to do; empty: the check's remedy


Run = Callable[[torch.device], Iterator[Seen]]


@dataclass(frozen=True)
class Check:
    """A check, and how its result is judged."""

    name: str
    expected: str
    remedy: str
    limit: int  # seconds after which it is cut short
    run: Run


def check(name: str, *, expected: str, remedy: str, limit: int) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        CHECKS[name] = Check(name, expected, remedy, limit, run)
        return run

    return register


def failed(what: str, error: Exception) -> Seen:
    """The line of a check that raised."""
    reason = first_line(error)
    if is_out_of_memory(error):
        return Seen(what, f"failed: out of memory ({reason})", False, MAKE_ROOM)
    place = _place(traceback.extract_tb(error.__traceback__))
    text = f"failed: {type(error).__name__}: {reason} ({place})"
    return Seen(what, text, False, NOT_ENDED)


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost of the frames outside torch, `warnings` and this file."""
    skipped = (str(Path(torch.__file__).parent), warnings.__file__, __file__)
    outside = [frame for frame in frames if not frame.filename.startswith(skipped)]
    frame = (outside or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}, {frame.name}"


LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    # so that the loss depends on the weights: with the usual 0.02 it is that of a guess
    "initializer_range": 0.1,
}
SMALL = Case("llama", LLAMA, steps=4, batch=8, length=200)
LIBRARIES = (
    "transformers",
    "triton",
    "bitsandbytes",
    "liger-kernel",
)


@check(
    "versions and card",
    expected="the card is free, and every kernel works",
    remedy=REPORT,
    limit=60,
)
def versions(device: torch.device) -> Iterator[Seen]:
    info = device_info(device)
    count = torch.cuda.device_count()
    cards = f", {count} of them" if count > 1 else ""
    yield Seen("card", f"{info['name']}{cards}")
    if device.type == "cuda":
        version = torch.version.hip or torch.version.cuda
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        yield Seen("driver", f"{_driver()}, {version}, capability {capability}")
    free, total = available_memory(device), info["memory_total"]
    text = f"{in_units(free)} of {in_units(total)} free"
    yield Seen("memory", text, free > 0.8 * total, MAKE_ROOM)
    shown = [f"python {python_version()}"]
    shown += [f"{name} {version_of(name)}" for name in ("lora-workbench", "torch", *LIBRARIES)]
    yield Seen("versions", ", ".join(shown))
    findings = try_kernels(device)
    for finding in findings:
        yield Seen(finding.tried, f"{finding.said}; {finding.slower}", False)
    if not findings:
        yield Seen("kernels", "all that were tried work")


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return f"{pynvml.nvmlSystemGetDriverVersion()}"
    except pynvml.NVMLError:  # on AMD, or in a container
        return "not known"


WAIT, READ = "synchronizing CUDA operation", "read_numbers"


@check(
    "a step without waits",
    expected="the host waits once a step: when it reads the numbers for the log",
    remedy=f"Each wait leaves the card idle. {REPORT}",
    limit=60,
)
def waits(device: torch.device) -> Iterator[Seen]:
    run = LoraRun(SMALL, device)
    run.step()  # here kernels are compiled and tried
    places, steps = _waits(run.epoch), SMALL.steps
    reads = places.pop(READ, 0)
    text = f"{reads} waits in {steps} steps" if reads else "no wait was noticed, not even this"
    yield Seen(READ, text, reads == steps)
    for place, count in places.items():
        yield Seen(place, f"{count} waits in {steps} steps", False)


def _waits(run: Callable[[], object]) -> Counter[str]:
    """Place → how often the host waited there: torch warns of each wait."""
    places = Counter[str]()

    def note(message: object, *_: object, **__: object) -> None:
        if WAIT in str(message):
            stack = traceback.extract_stack()
            reads = any(frame.name == READ for frame in stack)
            places[READ if reads else _place(stack)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


@check(
    "the same seed twice",
    expected="two trainings give the same bits",
    remedy=f"Runs on this card do not repeat exactly. {REPORT}",
    limit=60,
)
def repeats(device: torch.device) -> Iterator[Seen]:
    for what, embeddings in (("LoRA", False), ("LoRA and embeddings", True)):
        case = replace(SMALL, trains_embeddings=embeddings)
        first, second = LoraRun(case, device), LoraRun(case, device)
        yield _first_difference(what, first, second)


def _first_difference(what: str, first: LoraRun, second: LoraRun) -> Seen:
    steps = 2 * first.case.steps
    for number in range(1, steps + 1):
        first.step()
        second.step()
        others = second.trained()
        tensors = first.trained().items()
        different = [name for name, tensor in tensors if not torch.equal(tensor, others[name])]
        if different:
            more = len(others) - len(different)
            text = f"step {number}: {different[0]} differs first; {more} tensors are the same"
            return Seen(what, text, False)
    return Seen(what, f"the same bits in {steps} steps")


WIDE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "sliding_window": 256,
}
PACKED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@check(
    "packing",
    expected="sequences packed end to end give what each gives alone",
    remedy=f"Such a model trains one sequence at a time, and slower. {REPORT}",
    limit=90,
)
def packing(device: torch.device) -> Iterator[Seen]:
    for family, settings in PACKED.items():
        torch.manual_seed(0)
        with torch.device(device):
            model = from_config({**WIDE, "model_type": family, **settings}, torch.bfloat16).eval()
        with held() as findings:  # those of kernels too
            prepare_model(model, "none")
            packs = model.supports_packing
        why = "; ".join(map(str, findings))
        yield Seen(family, "yes" if packs else f"no: {why}", packs)


CLOSE = 0.01  # relative difference of losses and gradient norms


@check(
    "QLoRA",
    expected="losses and gradients with bitsandbytes are those of nf4.py, in 8 bits those of bf16, "
    f"to {CLOSE:.0%}",
    remedy=f"Train with quantization: none until this is known. {REPORT}",
    limit=90,
)
def quantized(device: torch.device) -> Iterator[Seen]:
    lacks, install = "bitsandbytes is not installed", f"`{install_command('qlora')}`"
    missing = missing_libraries("quantization: int8")
    for kind in ("nf4", "nf4-dq"):
        case = replace(SMALL, quantization=kind)
        with patch.object(quantized_linear, "_bitsandbytes", lambda: None):
            ours = _steps(case, device)
        if missing:
            text = f"{lacks}; by nf4.py the losses are {_losses(ours)}"
            yield Seen(kind, text, None, install)
        else:
            yield _compared(kind, _steps(case, device), ours)
    if missing:
        yield Seen("int8", lacks, None, install)
    else:
        int8 = _steps(replace(SMALL, quantization="int8"), device)
        yield _compared("int8", int8, _steps(SMALL, device))


def _steps(case: Case, device: torch.device) -> list[Step]:
    run = LoraRun(case, device)
    return [run.step() for _ in range(case.steps)]


def _losses(steps: Sequence[Step]) -> str:
    return ", ".join(f"{step.loss:.4f}" for step in steps)


def _compared(what: str, steps: Sequence[Step], expected: Sequence[Step]) -> Seen:
    pairs = [*zip(steps, expected, strict=True)]
    loss = max(abs(a.loss / b.loss - 1) for a, b in pairs)
    norm = max(abs(a.grad_norm / b.grad_norm - 1) for a, b in pairs)
    text = f"losses {_losses(steps)}, apart by {loss:.2%}; gradient norms by {norm:.2%}"
    return Seen(what, text, loss <= CLOSE and norm <= CLOSE)


@check(
    "several ranks",
    expected=f"two ranks take the steps of one, to {CLOSE:.0%}, with --shard too; if one is "
    f"killed, the run ends within {GRACE} s with one message",
    remedy=f"Train on one card until this is known. {REPORT}",
    limit=240,
)
def ranks(device: torch.device) -> Iterator[Seen]:
    if (torch.cuda.device_count() if device.type == "cuda" else cores()) < 2:
        yield Seen("", "one card: nothing to compare", None, "Run this where two cards are.")
        return
    with TemporaryDirectory() as name:
        project = _Project(Path(name), device)
        project.lora("import")
        alone = project.trained()
        yield _compared("LoRA", project.trained("--devices", "2"), alone)
        qlora = "--set=finetune_lora.quantization=nf4-dq"
        alone = project.trained(qlora)
        sharded = project.trained("--devices", "2", "--shard", qlora)
        yield _compared("QLoRA, sharded", sharded, alone)
        yield project.killed()


class _Project:
    """A small model, texts of different lengths and params.yaml, for the command line itself."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        self.folder, self.log = folder, folder / "runs/finetune_lora/loss.csv"
        self.environment = {**process.environment(), process.VARIABLE: device.type}
        base = folder / "base"
        words = {f"w{n}": n for n in range(64)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        base.mkdir()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="w1", unk_token="w2"
        ).save_pretrained(base)
        config = {
            **SMALL.config,
            "vocab_size": len(words),
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "eos_token_id": 1,
        }
        from_config(config, torch.bfloat16).save(base)
        with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
            for n in range(1, 33):
                text = " ".join(f"w{n * k % 60 + 3}" for k in range(4 + n * 7 % 50))
                file.write(json.dumps({"text": text}) + "\n")
        settings = {"data": "texts.jsonl", "epochs": 1, "batch_size": 4, "precision": "bf16"}
        params = json.dumps({"base": "base", "finetune_lora": settings})
        (folder / "params.yaml").write_text(params, encoding="utf-8")

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "cli.main", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)

    def lora(self, *arguments: str) -> None:
        running = self.start(*arguments)
        _, said = running.communicate()
        if running.returncode:
            raise RuntimeError(f"lora {' '.join(arguments)}: {' '.join(said.splitlines()[-1:])}")

    def trained(self, *flags: str) -> list[Step]:
        self.lora("finetune", "lora", "--force", *flags)
        return read_steps(self.log)

    def killed(self) -> Seen:
        """Kill rank 1 in the middle of a run."""
        self.log.unlink()
        endless = "--set=finetune_lora.epochs=100000"
        running = self.start("finetune", "lora", "--force", "--devices", "2", endless)
        while not self.log.exists() or len(read_steps(self.log)) < 3:
            if running.poll() is not None:
                raise RuntimeError(" ".join(running.communicate()[1].splitlines()[-1:]))
            time.sleep(0.05)
        children = psutil.Process(running.pid).children(recursive=True)
        second = next(child for child in children if child.environ().get("RANK") == "1")
        second.kill()
        started = time.perf_counter()
        try:
            _, said = running.communicate(timeout=2 * GRACE)
        except subprocess.TimeoutExpired:
            end_tree(running.pid)
            return Seen("a killed rank", f"the run has not ended after {2 * GRACE} s", False)
        seconds = time.perf_counter() - started
        errors = [line for line in said.splitlines() if line.startswith("error")]
        text = f"the run ended after {seconds:.1f} s, and said: {' '.join(errors) or 'nothing'}"
        as_expected = running.returncode == 1 and len(errors) == 1 and seconds <= GRACE
        return Seen("a killed rank", text, as_expected)


def end_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for running in (*parent.children(recursive=True), parent):
            with suppress(psutil.NoSuchProcess):
                running.kill()


LARGE = Case("llama-3.2-1b", entry("llama-3.2-1b")["config"], steps=3, batch=8)
NEEDED = 12 * 2**30  # bytes of a card on which all of its blocks train
EXACT = 0.05  # the largest relative error of a prediction of memory


@check(
    "memory",
    expected=f"the peak of a step is the predicted one, to {EXACT:.0%}",
    remedy=f"`lora calc` is off by so much for this card. {REPORT}",
    limit=90,
)
def memory(device: torch.device) -> Iterator[Seen]:
    base = LARGE
    if available_memory(device) < NEEDED:
        base = replace(LARGE, config={**LARGE.config, "num_hidden_layers": 2}, batch=2)
    for what, case in (("LoRA", base), ("QLoRA", replace(base, quantization="nf4-dq"))):
        peak = _peak(case, device)
        measured, predicted = in_units(peak.measured), in_units(peak.predicted)
        text = f"{measured} measured, {predicted} predicted ({peak.error:+.1%}){peak.beside}"
        name = f"{what}, {case.name}, {case.config['num_hidden_layers']} blocks"
        yield Seen(name, text, abs(peak.error) <= EXACT)


def _peak(case: Case, device: torch.device) -> Peak:
    # in a function of its own: the run's memory is free when it returns
    run = LoraRun(case, device)
    run.step()
    return run.peak()


FAST = Case("qwen3-0.6b", entry("qwen3-0.6b")["config"])
WIDE_CARD = 40 * 2**30  # bytes; a smaller card takes fewer sequences a step


@check(
    "tokens per second",
    expected="a number to compare with another card's; padding does not count",
    remedy=REPORT,
    limit=90,
)
def speed(device: torch.device) -> Iterator[Seen]:
    case = FAST if available_memory(device) >= WIDE_CARD else replace(FAST, batch=4)
    run = LoraRun(case, device)
    run.epoch()  # kernels are compiled
    what = f"training {case.name}, {case.batch} sequences a step"
    yield Seen(what, f"{run.tokens / run.seconds_of_epoch():,.0f}")


# how far a token's logit may be below the highest, of what that is above the mean: other kernels
# round otherwise, up to 0.8% on a CPU in bf16, where keys mixed up were off by 55% to 198%
ROUNDING = 0.05
MEASURED = 32  # tokens of an answer


@check(
    "answers",
    expected="sequences side by side, with keys in pages, get the tokens that each gets alone, to "
    f"{ROUNDING:.0%} of a logit",
    remedy=f"Answers on this card may be wrong. {REPORT}",
    limit=120,
)
@torch.no_grad()
def answers(device: torch.device) -> Iterator[Seen]:
    model = _answering(SMALL, device)
    prompts = [ids for ids, _ in SMALL.examples()]
    tokens = zip(*islice(_tokens(model, prompts), MEASURED), strict=True)
    distances = torch.stack([_distance(model, *pair) for pair in zip(prompts, tokens, strict=True)])
    largest, others = float(distances.max()), int(distances.count_nonzero())
    text = f"{others} of {distances.numel()} tokens differ, by {largest:.1%} of a logit at most"
    yield Seen("pages", text, largest <= ROUNDING)
    model = _answering(FAST, device)
    for count in (1, 64):
        stream = _tokens(model, [prompts[0]] * count)
        next(stream), next(stream)  # kernels are compiled
        start = time.perf_counter()
        list(islice(stream, MEASURED))
        rate = count * MEASURED / (time.perf_counter() - start)
        yield Seen(f"{FAST.name}, {count} side by side", f"{rate:,.0f} tokens per second")
    with torch.profiler.profile() as profiled:
        next(stream)
    launches = sum(e.count for e in profiled.key_averages() if "LaunchKernel" in e.key)
    text = f"{launches:,}, {launches / len(model.blocks):.0f} a block"
    yield Seen("launches of a token", text, True if launches else None)


def _answering(case: Case, device: torch.device) -> TransformersModel:
    """The model of a case, as a base that answers."""
    torch.manual_seed(0)
    dtype = torch.float16 if fast_precision(device) == "fp16" else torch.bfloat16
    with torch.device(device):
        model = from_config(case.config, dtype).eval()
    if not uses_cpu_kernels(device):
        model.prepare_for_accelerator(device)
    return model


def _tokens(model: CausalLM, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The next likeliest token of each prompt, side by side, again and again."""
    pool = PagePool()
    caches = [SequenceCache(pool, model.max_length) for _ in prompts]
    while True:
        rows = next_tokens(read_side_by_side(model, caches, prompts))
        ids = [finite_id(row.id) for row in rows]
        yield ids
        prompts = [[id_] for id_ in ids]


def _distance(model: CausalLM, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """(T,): how far each token of an answer is below the likeliest one, read without a cache."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits: Tensor = model(ids)[0, len(prompt) - 1 : -1].float()  # (T, V)
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    best = logits.amax(1)
    return (best - chosen) / (best - logits.mean(1))
