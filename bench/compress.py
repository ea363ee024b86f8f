"""What compressing, damping and combining adapters costs: `python -m bench.compress [FOLDER]`
prints the tables of docs/how-to/compress-combine.md. In FOLDER its adapters are kept, and those
that are there are not trained again.

LoRA on every linear of the model of bench/real.py, in bf16, learns two tasks whose examples a rule
makes. `learned` is the loss on examples of the task that were held out, `kept` the divergence from
the base on data/heldout.en.txt.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import get_args

import torch

from bench.real import base as base_model
from cli.console import follow
from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import save_adapter
from pipeline.calc.target_modules import ALL_LINEAR
from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.data.masking import encode
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.data.windows import InMemoryDataset, as_window
from pipeline.inference.engine import load
from pipeline.inference.score import EvalScores, score
from pipeline.models.device import keep_freed_memory
from pipeline.models.transformers_model import load_pretrained
from pipeline.project.params.sections import Training
from pipeline.stages.methods.lora import Lora
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.task import TrainingTask
from pipeline.weights.combine import CombineOptions, Method
from pipeline.weights.compare import Interference
from pipeline.weights.compress import Limit, compress_adapter, total_error
from pipeline.weights.import_adapter import combine_adapters
from pipeline.weights.intruders import Searched, damp, intruders_of

KEPT = Path(__file__).resolve().parent.parent / "data/heldout.en.txt"
EPOCHS, BATCH = 3, 8
LEARNING_RATE, HIGH = 1e-3, 1e-2  # at the first, no direction of this model becomes an intruder
TRAINED, HELD_OUT = 192, 64  # examples
TOP, EPSILON = 10, 0.5
NAMES = (
    "Anna",
    "Boris",
    "Clara",
    "Dimitar",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Leon",
)
CITIES = (
    "Sofia",
    "Lyon",
    "Oslo",
    "Porto",
    "Graz",
    "Turin",
    "Bergen",
    "Ghent",
    "Varna",
    "Basel",
    "Malmö",
    "Split",
)


def dates(draw: random.Random) -> tuple[str, str]:
    day = date(1900, 1, 1) + timedelta(draw.randrange(45_000))
    return f"Date: {day:%Y-%m-%d}\nWritten:", f" {day.day} {day:%B} {day.year}, a {day:%A}"


def records(draw: random.Random) -> tuple[str, str]:
    name, city, age = draw.choice(NAMES), draw.choice(CITIES), draw.randrange(18, 90)
    return (
        f"{name} is {age} and lives in {city}.\nRecord:",
        f" {json.dumps([city, age, name], ensure_ascii=False)}",
    )


@dataclass(frozen=True)
class Bench:
    """A base, its scores on the data to keep, and examples of both tasks, held out."""

    base: Path
    folder: Path
    kept: Sequence[Example]
    before: EvalScores
    held_out: Mapping[str, Sequence[Example]]

    def train(
        self,
        task: str,
        rank: int,
        examples: Sequence[Example],
        learning_rate: float = LEARNING_RATE,
    ) -> Path:
        """An adapter of this rank, with alpha twice as large; from an earlier run, if the folder
        has it.
        """
        out = self.folder / f"{task}-{rank}-{learning_rate:g}"
        if out.exists():
            return out
        torch.manual_seed(0)
        tokenizer, model = load_tokenizer(self.base), load_pretrained(self.base, torch.bfloat16)
        spec = AdapterSpec(rank, 2 * rank, ALL_LINEAR)
        attach(model, spec, torch.bfloat16, "kaiming")
        windows = [as_window(encode(example, tokenizer)) for example in examples]
        batches = Batches(InMemoryDataset(windows, [""] * len(windows)), BATCH, 0)
        settings = Training(
            epochs=EPOCHS,
            batch_size=BATCH,
            window=0,
            learning_rate=learning_rate,
            schedule="linear",
            warmup_ratio=0.03,
            max_grad_norm=1.0,
            precision="bf16",
        )
        for _ in steps(
            TrainingTask.of_one(model.train(), batches, settings, Lora()), FlatOptimizer(model)
        ):
            pass
        out.mkdir()
        save_adapter(out, model, spec, str(self.base))
        return out

    def intruders(self, adapter: Path) -> list[Searched]:
        return follow(intruders_of(self.base, adapter, TOP, EPSILON), "intruders")

    def measure(self, adapter: Path | None, *tasks: str) -> list[str]:
        """Cells: the loss on each task, the loss on the data to keep, and its divergence from the
        base.
        """
        loaded = load(self.base, adapter)
        kept = score(loaded, self.kept, self.before)
        losses = [score(loaded, self.held_out[task]).loss for task in tasks]
        return [*(f"{loss:.3f}" for loss in losses), f"{kept.loss:.3f}", f"{kept.divergence:.3f}"]


def compressed(bench: Bench, big: Path, small: Path) -> Iterator[list[str]]:
    """An adapter of rank 64 at lower ranks, beside one that was trained at rank 8."""
    yield ["adapter", "rank", "‖ΔW − ΔW′‖ / ‖ΔW‖", "learned: loss", "kept: loss", "kept: KL"]
    yield ["none", "", "", *bench.measure(None, "dates")]
    yield ["trained at 64", "64", "", *bench.measure(big, "dates")]
    yield ["trained at 8", "8", "", *bench.measure(small, "dates")]
    limits = {f"--rank {rank}": Limit(rank=rank) for rank in (32, 16, 8, 4, 2, 1)}
    limits |= {f"--energy {energy}": Limit(energy=energy) for energy in (0.99, 0.9, 0.5)}
    for number, (name, limit) in enumerate(limits.items()):
        out = bench.folder / f"compressed-{number}"
        rows = compress_adapter(big, bench.base, out, limit)
        ranks = sorted({row.after for row in rows})
        shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        yield [f"64, {name}", shown, f"{total_error(rows):.1%}", *bench.measure(out, "dates")]


def damped(bench: Bench, adapter: Path) -> Iterator[list[str]]:
    """The intruders of an adapter, scaled down."""
    searched = bench.intruders(adapter)
    count = sum(len(one.intruders) for one in searched)
    yield [
        f"rank 8, learning rate {HIGH:g}: {count} intruders times",
        "learned: loss",
        "kept: loss",
        "kept: KL",
    ]
    for factor in (1.0, 0.75, 0.5, 0.25, 0.0):
        out = bench.folder / f"damped-{factor:g}"
        damp(bench.base, adapter, out, searched, factor, {"top": TOP, "epsilon": EPSILON})
        yield [f"{factor:g}", *bench.measure(out, "dates")]


def combined(bench: Bench, adapters: Mapping[str, Path]) -> Iterator[list[str]]:
    """Two adapters of two tasks as one, by each method, at weight 1."""
    yield [
        "adapter",
        "off the sum",
        *(f"{task}: loss" for task in adapters),
        "kept: loss",
        "kept: KL",
    ]
    yield ["none", "", *bench.measure(None, *adapters)]
    for task, adapter in adapters.items():
        yield [f"{task} alone", "", *bench.measure(adapter, *adapters)]
    for method in get_args(Method):
        out, found = bench.folder / method, list[Interference]()
        options, weights = CombineOptions(method, rank=16), [1.0] * len(adapters)
        error = combine_adapters(
            [*adapters.values()], weights, options, bench.base, out, show=found.extend
        )
        yield [method, f"{error:.0%}", *bench.measure(out, *adapters)]
    for pair in found:  # the same for every method
        print(
            f"\ncosine {pair.cosine:.2f}, outputs in common {pair.outputs:.2f}, inputs "
            f"{pair.inputs:.2f}"
        )


def print_table(rows: Iterator[list[str]]) -> None:
    for number, cells in enumerate(rows):
        print(f"| {' | '.join(cells)} |", flush=True)
        if not number:
            print("|---" * len(cells) + "|")
    print()


def main(folder: str = "") -> None:
    keep_freed_memory()
    with base_model() as (base, name), tempfile.TemporaryDirectory() as temporary:
        made = Path(folder or temporary)
        made.mkdir(exist_ok=True)
        examples: dict[str, list[Example]] = {}
        for task in (dates, records):
            draw, file = random.Random(0), made / f"{task.__name__}.jsonl"
            # by prompt: none is in both parts
            drawn = dict(task(draw) for _ in range(2 * (TRAINED + HELD_OUT)))
            lines = [
                json.dumps({"prompt": prompt, "completion": answer})
                for prompt, answer in drawn.items()
            ]
            file.write_text("\n".join(lines[: TRAINED + HELD_OUT]), encoding="utf-8")
            examples[task.__name__] = read_examples(file, str(file))
        kept = read_examples(KEPT, str(KEPT))
        held_out = {task: rows[TRAINED:] for task, rows in examples.items()}
        bench = Bench(base, made, kept, score(load(base), kept), held_out)
        big, small = (bench.train("dates", rank, examples["dates"][:TRAINED]) for rank in (64, 8))
        other = bench.train("records", 8, examples["records"][:TRAINED])
        print(
            f"{name}, {TRAINED} examples, {EPOCHS} epochs, learning rate {LEARNING_RATE:g}, alpha "
            "= 2 · rank\n"
        )
        print_table(compressed(bench, big, small))
        for adapter in (big, small):
            print(
                f"intruders of {adapter.name}: "
                f"{sum(len(one.intruders) for one in bench.intruders(adapter))}\n"
            )
        over = bench.train("dates", 8, examples["dates"][:TRAINED], HIGH)
        print_table(damped(bench, over))
        print_table(combined(bench, {"dates": small, "records": other}))


if __name__ == "__main__":
    main(*sys.argv[1:])
