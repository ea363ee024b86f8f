"""LoRA on a real model against PEFT with transformers' Trainer and TRL, with and without padding:
time, memory, final loss, and generation.

The model is LORA_BENCH_BASE or `smollm2/artifacts/base`; if missing, SmolLM2-135M's shapes with
random weights.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from bench.measure import Row
from bench.peers import PaddingFree, TrlPaddingFree
from bench.real_sides import NEW_TOKENS, Ours, Theirs, examples, serve

BASE = Path("smollm2/artifacts/base")
ROUNDS = 3


@dataclass(frozen=True)
class Peer:
    """What an epoch is compared with, and the goals: how much faster ours is, and ours as a share
    of its memory.
    """

    name: str
    kind: type[Theirs]
    speedup: float
    memory: float


PADDED = Peer("PEFT and Trainer, padded", Theirs, 4.5, 0.21)
PEERS = (
    PADDED,
    Peer("PEFT and Trainer without padding", PaddingFree, 2.5, 0.6),
    Peer("TRL without padding", TrlPaddingFree, 2.5, 0.6),
)
THREADS = int(os.environ.get("LORA_BENCH_THREADS", os.cpu_count() or 1))


def real() -> Iterator[Row]:
    """One epoch of 32 examples at batch size 8 per turn, each side in its own process. Tokens a
    second count no padding.
    """
    with base() as (folder, name), ExitStack() as stack:
        ours = stack.enter_context(side(Ours, folder))
        peers = {peer: stack.enter_context(side(peer.kind, folder)) for peer in PEERS}
        turns = []
        for _ in range(ROUNDS + 1):
            turn = {peer.name: ask(pipe, "epoch") for peer, pipe in peers.items()}
            turns.append(turn | {"products": ask(ours, "products"), "ours": ask(ours, "epoch")})
        # the first is a warm-up
        times = {what: median(turn[what] for turn in turns[1:]) for what in turns[0]}
        growth, loss = ask(ours, "memory_growth"), ask(ours, "loss")
        yield from _training(name, times)
        for peer, pipe in peers.items():
            yield _memory(growth, peer, ask(pipe, "memory_growth"))
            yield _loss(loss, peer, ask(pipe, "loss"))
        theirs = peers[PADDED]
        turns_of_generation = [
            (ask(theirs, "generate"), ask(ours, "generate")) for _ in range(ROUNDS + 1)
        ][1:]
        yield _generation(*(median(times) for times in zip(*turns_of_generation, strict=True)))


def _training(name: str, times: dict[str, float]) -> Iterator[Row]:
    tokens = sum(len(ids) for ids, _ in examples(32, 0))
    mine, least = times["ours"], times["products"]
    what = f"LoRA epoch, {name}, {tokens / mine:,.0f} tokens a second"
    for peer in PEERS:
        other = times[peer.name]
        ratio, goal = other / mine, f"at least {peer.speedup:g} ×"
        reference = f"{peer.name}, {tokens / other:,.0f} tokens a second"
        yield Row(what, mine, reference, ratio, goal, ratio >= peer.speedup)
    what, share = "the same, share of what its matrix products allow", least / mine
    reference = f"the products alone, {tokens / least:,.0f} tokens a second"
    yield Row(what, mine, reference, share, "at least 0.8 ×", share >= 0.8)


def _memory(mine: float, peer: Peer, other: float) -> Row:
    what = f"the same, resident memory beyond the loaded model: {mine / 2**20:,.0f} MiB at the peak"
    reference, ratio = f"{peer.name}, {other / 2**20:,.0f} MiB", mine / other
    return Row(what, 0, reference, ratio, f"at most {peer.memory:g} ×", ratio <= peer.memory)


def _loss(mine: float, peer: Peer, other: float) -> Row:
    what = f"the same, held-out loss {mine:.4f} after {ROUNDS + 1} epochs"
    reference, ratio = f"{peer.name}, {other:.4f}", mine / other
    return Row(what, 0, reference, ratio, "within 1%", abs(ratio - 1) < 0.01)


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
