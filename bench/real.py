"""LoRA on a real model against PEFT with transformers' Trainer: time, memory, final loss, and
generation.

The model is LORA_BENCH_BASE or `smollm2/artifacts/base`; if missing, SmolLM2-135M's shapes with
random weights.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from bench.measure import Row
from bench.real_sides import NEW_TOKENS, Ours, Theirs, examples, serve

BASE = Path("smollm2/artifacts/base")
ROUNDS = 3
THREADS = int(os.environ.get("LORA_BENCH_THREADS", os.cpu_count() or 1))


def real() -> Iterator[Row]:
    """One epoch of 32 examples at batch size 8 per turn, each side in its own process."""
    with base() as (folder, name), side(Ours, folder) as ours, side(Theirs, folder) as theirs:
        times: dict[str, list[float]] = {"ours": [], "theirs": [], "products": []}
        for turn in range(ROUNDS + 1):  # the first is a warm-up
            results = {
                "theirs": ask(theirs, "epoch"),
                "products": ask(ours, "products"),
                "ours": ask(ours, "epoch"),
            }
            for what, seconds in results.items():
                times[what] += [seconds] if turn else []
        yield from _training(name, {what: median(seconds) for what, seconds in times.items()})
        yield _memory(ask(ours, "memory_growth"), ask(theirs, "memory_growth"))
        yield _loss(ask(ours, "loss"), ask(theirs, "loss"))
        turns = [(ask(theirs, "generate"), ask(ours, "generate")) for _ in range(ROUNDS + 1)][1:]
        yield _generation(*(median(times) for times in zip(*turns, strict=True)))


def _training(name: str, times: dict[str, float]) -> Iterator[Row]:
    tokens = sum(len(ids) for ids, _ in examples(32, 0))
    mine, other, least = times["ours"], times["theirs"], times["products"]
    what = f"LoRA epoch, {name}, {tokens / mine:,.0f} tokens a second"
    reference = f"PEFT and Trainer, {tokens / other:,.0f} tokens a second"
    yield Row(what, mine, reference, other / mine, "at least 4 ×", other / mine >= 4)
    reference = f"matrix products alone, {tokens / least:,.0f} tokens a second"
    yield Row(
        "the same, share of what they allow",
        mine,
        reference,
        least / mine,
        "at least 0.75 ×",
        least / mine >= 0.75,
    )


def _memory(mine: float, other: float) -> Row:
    what = f"the same, resident memory beyond the loaded model: {mine / 2**20:,.0f} MiB at the peak"
    reference = f"PEFT and Trainer, {other / 2**20:,.0f} MiB"
    return Row(what, 0, reference, mine / other, "at most 0.28 ×", mine / other <= 0.28)


def _loss(mine: float, other: float) -> Row:
    what, reference = (
        f"the same, held-out loss {mine:.4f} after {ROUNDS + 1} epochs",
        f"PEFT and Trainer, {other:.4f}",
    )
    return Row(what, 0, reference, mine / other, "within 1%", abs(mine / other - 1) < 0.01)


def _generation(other: float, mine: float) -> Row:
    what, ratio = f"generation, {NEW_TOKENS / mine:,.0f} tokens a second", other / mine
    reference = f"model.generate, {NEW_TOKENS / other:,.0f} tokens a second"
    return Row(what, mine, reference, ratio, "at least 2 ×", ratio >= 2)


@contextmanager
def side(kind: Callable[[Path], object], folder: Path) -> Iterator[Connection]:
    """A pipe to a process that runs one side."""
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=serve, args=(child_end, kind, folder, THREADS), daemon=True)
    process.start()
    child_end.close()  # so that recv ends if the side dies
    try:
        yield parent_end
    finally:
        if process.is_alive():
            parent_end.send(None)
        process.join(10)
        process.terminate()


def ask(pipe: Connection, order: str) -> float:
    """The result of the side's method called `order`."""
    pipe.send(order)
    answer: float = pipe.recv()
    return answer


@contextmanager
def base() -> Iterator[tuple[Path, str]]:
    """A checkpoint's folder and its display name."""
    folder = Path(os.environ.get("LORA_BENCH_BASE", BASE))
    if folder.is_dir():
        yield folder, "SmolLM2-135M"
        return
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder_name:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder_name)
        yield Path(folder_name), "SmolLM2-135M's shapes, random weights"
