"""DPO on the model of bench/real.py against TRL's DPOTrainer with PEFT: time and memory of a step.

Neither side recomputes activations: TRL does by default, which takes it more time.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from typing_extensions import override

from bench.measure import Row
from bench.peers import unused_tokenizer
from bench.real import ROUNDS, ask, base, side
from bench.real_sides import ARGUMENTS, CLIP, LEARNING_RATE, Ours, Side, Theirs, encoded
from pipeline.data.windows import as_window
from pipeline.stages.methods.dpo import Dpo, FinetuneDpo
from pipeline.training.preferences.batches import AnswerBatches, Answers, batch_of
from pipeline.training.preferences.losses import PreferencePath, likelihood
from pipeline.training.step import Learner
from pipeline.training.task import TrainingTask

PAIRS, BATCH, BETA, END = 8, 4, 0.1, 0
Pair = dict[str, list[int]]


def preferences() -> Iterator[Row]:
    """Steps of four pairs in bf16. TRL computes the reference once, as we do, and then in each
    step, its default.
    """
    with base() as (folder, name):
        for when, precomputed in (("before training", True), ("in each step", False)):
            with side(OurDpo, folder) as ours, side(partial(TrlDpo, precomputed), folder) as theirs:
                before = ask(ours, "margin"), ask(theirs, "margin")
                turns = [(ask(theirs, "epoch"), ask(ours, "epoch")) for _ in range(ROUNDS + 1)][1:]
                other, mine = (median(times) * BATCH / PAIRS for times in zip(*turns, strict=True))
                growth, their_growth = ask(ours, "memory_growth"), ask(theirs, "memory_growth")
                rise, their_rise = (
                    ask(ours, "margin") - before[0],
                    ask(theirs, "margin") - before[1],
                )
            reference, ratio = f"TRL and PEFT, reference {when}, {other:.2f} s", other / mine
            yield Row(
                f"step of DPO, {name}", mine, reference, ratio, "at least 2.5 ×", ratio >= 2.5
            )
            what = (
                f"the same, resident memory beyond the loaded model: {growth / 2**20:,.0f} MiB at "
                "the peak"
            )
            reference, ratio = (
                f"TRL and PEFT, {their_growth / 2**20:,.0f} MiB",
                growth / their_growth,
            )
            yield Row(what, 0, reference, ratio, "at most 0.4 ×", ratio <= 0.4)
            what, ratio = (
                f"the same, the trained pairs' margin rises by {rise:.2f} nats",
                rise / their_rise,
            )
            yield Row(
                what,
                0,
                f"TRL and PEFT, {their_rise:.2f}",
                ratio,
                "within 15%",
                abs(ratio - 1) < 0.15,
            )


def pairs() -> list[Pair]:
    """Prompts of 20 to 120 tokens, answers of 15 to 180; rejected ones tend to be longer. Low ids
    are most frequent.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(middle: float, most: int) -> list[int]:
        length = int(
            torch.empty(1)
            .log_normal_(math.log(middle), 0.5, generator=generator)
            .clamp(15, most)
            .item()
        )
        return (torch.empty(length).exponential_(0.02, generator=generator).int() + 500).tolist()

    return [
        {
            "prompt": draw(45, 120),
            "chosen": [*draw(60, 180), END],
            "rejected": [*draw(90, 180), END],
        }
        for _ in range(PAIRS)
    ]


@torch.no_grad()
def margin(side: Side) -> float:
    """The mean of log p(chosen) − log p(rejected) over the pairs, in nats."""

    def log_prob(prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer])
        logits = side.logits(ids)[len(prompt) - 1 : -1].float()
        return -F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()

    side.model.eval()
    return mean(
        log_prob(one["prompt"], one["chosen"]) - log_prob(one["prompt"], one["rejected"])
        for one in pairs()
    )


class InOrder(AnswerBatches):
    """Without shuffling, as on the other side."""

    @override
    def _shuffle(self, epoch: int) -> list[int]:
        return list(range(PAIRS))


class OurDpo(Ours):
    """As in `lora finetune dpo`."""

    def task(self, model: Any) -> TrainingTask:
        sequences = [
            (pair["prompt"] + pair[answer], [-100] * len(pair["prompt"]) + pair[answer])
            for pair in pairs()
            for answer in ("chosen", "rejected")
        ]
        answers = Answers(
            [as_window(encoded(sequence)) for sequence in sequences],
            lambda _: "",
            ((range(PAIRS), 1.0),),
        )
        with torch.no_grad():  # LoRA begins with B = 0: the model is still its base
            batches = [batch_of(answers, range(n, n + 2)) for n in range(0, 2 * PAIRS, 2)]
            reference = torch.cat([likelihood(model, batch).summed for batch in batches])
        settings = FinetuneDpo(
            epochs=10**6,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            max_grad_norm=CLIP,
            precision="bf16",
            schedule="constant",
            warmup_steps=0,
            beta=BETA,
        )
        learner = Learner(settings, InOrder(replace(answers, reference=reference), BATCH, 0))
        return TrainingTask(model, [learner], PreferencePath(model, settings), method=Dpo())

    def margin(self) -> float:
        return margin(self)


class TrlDpo(Theirs):
    """`precomputed`: the reference's log-probabilities are computed before training."""

    def __init__(self, precomputed: bool, folder: Path) -> None:
        self.precomputed = precomputed
        super().__init__(folder)

    def add_adapter(self, model: Any) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Tokenized(DPOTrainer):  # type: ignore[misc]
            """For data that is tokens already."""

            def _prepare_dataset(self, dataset: Any, *_: object) -> Any:
                return Dataset.from_list(
                    [{f"{key}_ids": ids for key, ids in row.items()} for row in dataset]
                )

        arguments = DPOConfig(
            **ARGUMENTS,
            beta=BETA,
            per_device_train_batch_size=BATCH,
            gradient_checkpointing=False,
            precompute_ref_log_probs=self.precomputed,
        )
        model, data = super().add_adapter(model), Dataset.from_list(pairs())
        self.dpo = Tokenized(
            model, args=arguments, train_dataset=data, processing_class=unused_tokenizer()
        )
        return model

    @override
    def trainer(self) -> Any:
        return self.dpo

    def margin(self) -> float:
        return margin(self)
