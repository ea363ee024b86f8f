"""Batched training of adapters, on MiniGPT and the model of bench/real.py, against one adapter and
PEFT in sequence.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from msgspec.structs import replace

from bench.measure import Row, in_turns
from bench.real import ROUNDS, ask, base, side
from bench.real_sides import (
    BATCH,
    CLIP,
    LEARNING_RATE,
    RANK,
    TARGETS,
    InOrder,
    Ours,
    Theirs,
    encoded,
    seconds,
)
from bench.training import batches, minigpt, our_steps, reference_steps
from pipeline.adapters.attach import attach
from pipeline.adapters.batched import attach_many
from pipeline.adapters.config import AdapterSpec
from pipeline.data.windows import InMemoryDataset, as_window
from pipeline.models.base import CausalLM
from pipeline.models.load import load_base
from pipeline.stages.methods.lora import FinetuneLora, lora_spec
from pipeline.training import batched
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.step import Learner
from pipeline.training.task import TrainingTask, build_optimizer

SMALL, LARGE = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
STEPS, TURNS = 50, 9
MAX_RATIO = {8: 1.45}  # × one adapter


def sweep() -> Iterator[Row]:
    """Adapters that differ in seed and order of the data."""
    yield from _small()
    yield from _large()


def _small() -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        minigpt(Path(folder))
        runs = {f"{count}": _sweep_steps(Path(folder), count) for count in SMALL}
        runs |= {
            "one": our_steps(Path(folder), "lora"),
            "PEFT": reference_steps(Path(folder), "lora"),
        }
        times = in_turns(runs, TURNS)
    for count in SMALL:
        yield from _rows(
            "MiniGPT", count, times[str(count)] / STEPS, times["one"] / STEPS, times["PEFT"] / STEPS
        )


def _rows(model: str, count: int, mine: float, one: float, other: float) -> Iterator[Row]:
    max_ratio, min_speedup = (
        MAX_RATIO.get(count) if model == "MiniGPT" else None,
        6 if (model, count) == ("MiniGPT", 8) else None,
    )
    what, ratio = f"step of {count} adapters in one pass, {model}", mine / one
    goal = "" if max_ratio is None else f"at most {max_ratio:g} ×"
    yield Row(
        what,
        mine,
        f"one alone, {one * 1e3:.2f} ms",
        ratio,
        goal,
        max_ratio is None or ratio <= max_ratio,
    )
    ratio, goal = count * other / mine, "" if min_speedup is None else f"at least {min_speedup:g} ×"
    yield Row(
        "the same",
        mine,
        f"PEFT, {count} one after the other",
        ratio,
        goal,
        min_speedup is None or ratio >= min_speedup,
    )


def _sweep_steps(folder: Path, count: int) -> Callable[[], None]:
    model, _ = load_base(folder)
    model.prepare_cpu_training()
    settings = [
        replace(FinetuneLora(epochs=10**9), seed=seed, learning_rate=1e-3) for seed in range(count)
    ]
    task = task_of(
        model,
        [lora_spec(model, s, ()) for s in settings],
        settings,
        [batches(s.seed) for s in settings],
    )
    return _run_steps(task, STEPS)


def task_of(
    model: CausalLM,
    specs: list[AdapterSpec],
    settings: list[FinetuneLora],
    orders: list[Batches],
    dtype: Any = None,
) -> TrainingTask:
    """A task with adapters as in `lora finetune sweep`."""

    def attach_with(spec: AdapterSpec, adapter_settings: FinetuneLora) -> Callable[[], None]:
        def attach_one() -> None:
            torch.manual_seed(adapter_settings.seed)
            attach(model, spec, dtype)

        return attach_one

    routing = attach_many(model, [attach_with(*pair) for pair in zip(specs, settings, strict=True)])
    learners = [
        Learner(own, order, name=str(n))
        for n, (own, order) in enumerate(zip(settings, orders, strict=True))
    ]
    return TrainingTask(model.train(), learners, batched.ManyAdapters(model, routing))


def _run_steps(task: TrainingTask, count: int) -> Callable[[], None]:
    records = steps(
        task, build_optimizer(task.model, *(learner.settings for learner in task.learners))
    )

    def run() -> None:
        for _ in range(count):
            next(records)

    return run


def _large() -> Iterator[Row]:
    with base() as (folder, name), ExitStack() as stack:
        sides = {
            str(count): stack.enter_context(side(partial(ManyAdapters, count), folder))
            for count in LARGE
        }
        sides |= {
            "one": stack.enter_context(side(OneAdapter, folder)),
            "PEFT": stack.enter_context(side(PeftStep, folder)),
        }
        turns = [
            {what: ask(pipe, "epoch") for what, pipe in sides.items()} for _ in range(ROUNDS + 1)
        ][1:]
        times = {what: median(turn[what] for turn in turns) for what in sides}
        growth = {what: ask(pipe, "memory_growth") for what, pipe in sides.items()}
    for count in LARGE:
        yield from _rows(name, count, times[str(count)], times["one"], times["PEFT"])
    what, reference = (
        "resident memory beyond the base: 8 adapters",
        f"8 of one alone, {8 * growth['one'] / 2**20:,.0f} MiB",
    )
    ratio = growth["8"] / (8 * growth["one"])
    yield Row(
        f"{what}, {growth['8'] / 2**20:,.0f} MiB",
        0,
        reference,
        ratio,
        "at most 1.1 ×",
        ratio <= 1.1,
    )


class OneAdapter(Ours):
    """A step of one adapter."""

    def training_examples(self) -> list[Any]:
        return super().training_examples()[:BATCH]


class PeftStep(Theirs):
    def training_examples(self) -> list[Any]:
        return super().training_examples()[:BATCH]


class ManyAdapters(OneAdapter):
    """A step of `count` adapters."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        super().__init__(folder)

    def add_adapter(self, model: Any) -> Any:
        windows = InMemoryDataset(
            [as_window(encoded(example)) for example in self.train], [""] * len(self.train)
        )
        settings = [
            FinetuneLora(
                seed=n,
                epochs=10**6,
                batch_size=BATCH,
                window=0,
                learning_rate=LEARNING_RATE,
                max_grad_norm=CLIP,
            )
            for n in range(self.count)
        ]
        specs = [AdapterSpec(RANK, 2 * RANK, TARGETS)] * self.count
        orders: list[Batches] = [InOrder(windows, BATCH, 0) for _ in settings]
        task = task_of(model, specs, settings, orders, torch.bfloat16)
        with task.path.base():
            model.prepare_cpu_training()
        self.step = _run_steps(task, 1)
        return model

    def epoch(self) -> float:
        return seconds(self.step)
