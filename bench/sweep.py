"""Many adapters in one pass: on MiniGPT and on the model of bench/real.py, beside one, and PEFT one after the other."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Row, in_turns
from bench.real import ROUNDS, ask, base, side
from bench.real_sides import BATCH, CLIP, LEARNING_RATE, RANK, TARGETS, InOrder, Ours, Theirs, encoded, seconds
from bench.training import batches, minigpt, ours_of, reference_of
from pipeline.adapters.attach import attach
from pipeline.adapters.batched import attach_many
from pipeline.adapters.config import AdapterSpec
from pipeline.data.windows import InMemoryDataset, as_window
from pipeline.models.base import CausalLM
from pipeline.models.kernels.allocator import keep_freed_memory
from pipeline.models.kernels.rms_norm import fuse_rms_norms
from pipeline.models.load import load_base
from pipeline.project.params.sections import FinetuneLora
from pipeline.stages.finetune import lora_spec
from pipeline.training.batched.loop import AdapterProgress, steps
from pipeline.training.batched.step import BatchedTrainingTask, Variant
from pipeline.training.batches import Batches
from pipeline.training.optimizer import BatchedAdam

SMALL, LARGE = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
STEPS, TURNS = 50, 9
MOST = {8: 1.6}  # times of one


def sweep() -> Iterator[Row]:
    """Adapters that differ in their seed and order of the data."""
    yield from _small()
    yield from _large()


def _small() -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        minigpt(Path(folder))
        runs = {f"{count}": _many(Path(folder), count) for count in SMALL}
        runs |= {"one": ours_of(Path(folder), "lora"), "PEFT": reference_of(Path(folder), "lora")}
        times = in_turns(runs, TURNS)
    for count in SMALL:
        yield from _rows("MiniGPT", count, times[str(count)] / STEPS, times["one"] / STEPS, times["PEFT"] / STEPS)


def _rows(model: str, count: int, mine: float, one: float, other: float) -> Iterator[Row]:
    most, least = MOST.get(count) if model == "MiniGPT" else None, 6 if (model, count) == ("MiniGPT", 8) else None
    what, ratio = f"step of {count} adapters in one pass, {model}", mine / one
    goal = "" if most is None else f"at most {most:g} ×"
    yield Row(what, mine, f"one alone, {one * 1e3:.2f} ms", ratio, goal, most is None or ratio <= most)
    ratio, goal = count * other / mine, "" if least is None else f"at least {least:g} ×"
    yield Row("the same", mine, f"PEFT, {count} one after the other", ratio, goal, least is None or ratio >= least)


def _many(folder: Path, count: int) -> Callable[[], None]:
    model, _ = load_base(folder)
    own = [replace(FinetuneLora(epochs=10**9), seed=seed, learning_rate=1e-3) for seed in range(count)]
    task = task_of(model, [lora_spec(model, one, ()) for one in own], own, [batches(one.seed) for one in own])
    return _stepping(task, STEPS)


def task_of(
    model: CausalLM, specs: list[AdapterSpec], own: list[FinetuneLora], orders: list[Batches], dtype: Any = None
) -> BatchedTrainingTask:
    """Adapters as `lora finetune sweep` trains them."""

    def attaching(spec: AdapterSpec, settings: FinetuneLora) -> Callable[[], None]:
        def attach_one() -> None:
            torch.manual_seed(settings.seed)
            attach(model, spec, dtype)

        return attach_one

    share = attach_many(model, [attaching(*pair) for pair in zip(specs, own, strict=True)])
    variants = (Variant(str(n), *pair) for n, pair in enumerate(zip(own, orders, strict=True)))
    return BatchedTrainingTask(model.train(), share, tuple(variants))


def _stepping(task: BatchedTrainingTask, count: int) -> Callable[[], None]:
    trained = [p for p in task.model.parameters() if p.requires_grad]
    records = steps(task, BatchedAdam(trained, [1.0] * len(trained)), AdapterProgress.of(len(task.variants)))

    def run() -> None:
        for _ in range(count):
            next(records)

    return run


def _large() -> Iterator[Row]:
    with base() as (folder, name), ExitStack() as stack:
        sides = {str(count): stack.enter_context(side(partial(Many, count), folder)) for count in LARGE}
        sides |= {"one": stack.enter_context(side(One, folder)), "PEFT": stack.enter_context(side(Other, folder))}
        turns = [{what: ask(pipe, "epoch") for what, pipe in sides.items()} for _ in range(ROUNDS + 1)][1:]
        times = {what: median(turn[what] for turn in turns) for what in sides}
        grown = {what: ask(pipe, "grown") for what, pipe in sides.items()}
    for count in LARGE:
        yield from _rows(name, count, times[str(count)], times["one"], times["PEFT"])
    what, reference = (
        "resident memory beyond the base: 8 adapters",
        f"8 of one alone, {8 * grown['one'] / 2**20:,.0f} MiB",
    )
    ratio = grown["8"] / (8 * grown["one"])
    yield Row(f"{what}, {grown['8'] / 2**20:,.0f} MiB", 0, reference, ratio, "at most 1.1 ×", ratio <= 1.1)


class One(Ours):
    """A step of one adapter."""

    def taught(self) -> list[Any]:
        return super().taught()[:BATCH]


class Other(Theirs):
    def taught(self) -> list[Any]:
        return super().taught()[:BATCH]


class Many(One):
    """A step of `count` adapters."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        super().__init__(folder)

    def adapted(self, model: Any) -> Any:
        keep_freed_memory()
        fuse_rms_norms(model)
        windows = InMemoryDataset([as_window(encoded(one)) for one in self.train], [""] * len(self.train))
        own = [
            FinetuneLora(seed=n, epochs=10**6, batch_size=BATCH, window=0, learning_rate=LEARNING_RATE, clip_norm=CLIP)
            for n in range(self.count)
        ]
        specs = [AdapterSpec(RANK, 2 * RANK, TARGETS)] * self.count
        orders: list[Batches] = [InOrder(windows, BATCH, 0) for _ in own]
        self.step = _stepping(task_of(model, specs, own, orders, torch.bfloat16), 1)
        return model

    def epoch(self) -> float:
        return seconds(self.step)
