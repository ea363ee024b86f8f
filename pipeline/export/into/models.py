"""What quantized models answer, against base + adapter in full precision."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.adapters.folder import quantization_of
from pipeline.adapters.peft import Reading
from pipeline.data.answers.prompts import prompt_texts
from pipeline.data.examples import Example
from pipeline.data.formats import iter_examples
from pipeline.data.masking import Encoded, Encoder
from pipeline.export.certificate import MOST_TOKENS
from pipeline.export.formats import Export
from pipeline.export.into import Into
from pipeline.export.into.gptq import input_grams, linear_widths
from pipeline.inference.engine import LoadedModel, load
from pipeline.inference.score import builtin_prompts, difference_of
from pipeline.models.base import compute_in_fp32, packed_hidden_states
from pipeline.project.new_project import DEFAULTS
from pipeline.project.params.sections import Quantization
from pipeline.project.runner import Event, Progress

Logits = Callable[[Sequence[int]], Tensor]  # ids → (T, V) in fp32, on the CPU
Opens = Callable[[], AbstractContextManager[Logits]]
T = TypeVar("T")
# tokens of data, and as many of everyday English, whose activations GPTQ sees
MOST_CALIBRATION = 4096
# of data: examples that are read, and tokens that the losses are of
MOST_EXAMPLES, MOST_DATA = 2000, 8192


class Job(NamedTuple):
    """The merge to measure."""

    export: Export
    into: Into
    base: Path
    reading: Reading

    def load(self, adapter: Path | None, quantization: Quantization | None = None) -> LoadedModel:
        """The base, by default as the adapter was trained on it, with an adapter or alone."""
        return load(
            self.base,
            adapter,
            trust_remote_code=self.export.trust_remote_code,
            quantization=quantization or quantization_of(self.export.adapter),
            reading=self.reading,
        )


class Questions(NamedTuple):
    """What is asked of each model, and what calibrates the rounding; nothing is in both."""

    prompts: list[list[int]]
    examples: list[Encoded]
    calibration: list[list[int]]

    @classmethod
    def of(cls, loaded: LoadedModel, into: Into, prompts: Path | None) -> "Questions":
        """`loaded` is base + adapter. With GPTQ, every other example is calibrated on instead."""
        tokenizer, model = loaded.tokenizer, loaded.model
        encode = Encoder(tokenizer, model.max_length, model.shape.positions)

        def encoded(examples: Sequence[Example]) -> list[Encoded]:
            return [found for _, found in encode.each(examples)]

        def within(most: int, sequences: Iterable[Sequence[int]]) -> list[list[int]]:
            cut = [list(ids[: min(model.max_length, most)]) for ids in sequences]
            return _first(most, [ids for ids in cut if ids], len)

        texts = prompt_texts(prompts) or builtin_prompts()
        asked = within(MOST_TOKENS, map(tokenizer.encode, texts))
        examples = list[Encoded]()
        if into.data:
            some = islice(iter_examples(into.data, str(into.data)), MOST_EXAMPLES)
            examples = encoded([*some])
        seen = list[Encoded]()
        if into.rounding == "gptq" and len(examples) > 1:
            seen, examples = examples[::2], examples[1::2]
        examples = _first(MOST_DATA, examples, lambda example: len(example.ids))
        if into.rounding == "nearest":
            return cls(asked, examples, [])
        learned = within(MOST_CALIBRATION, (example.ids for example in seen))
        everyday = within(MOST_CALIBRATION, map(tokenizer.encode, _everyday()))
        return cls(asked, examples, learned + everyday)


def _first(most: int, items: Sequence[T], size: Callable[[T], int]) -> list[T]:
    """As many of the first items as have a size of `most` together, and at least one."""
    ends = accumulate(map(size, items))
    return [item for item, end in zip(items, ends, strict=True) if end <= most] or [*items[:1]]


def _everyday() -> Iterator[str]:
    """Questions with their answers in two lengths, as plain text."""
    name = "data/concise.en.jsonl"
    return (example.text for example in iter_examples(DEFAULTS / name, name))


@contextmanager
def in_torch(loaded: LoadedModel) -> Iterator[Logits]:
    """Computes in fp32, whatever the weights are stored in."""
    model = loaded.model

    @torch.no_grad()
    def logits(ids: Sequence[int]) -> Tensor:
        (hidden,) = packed_hidden_states(model, [ids])
        return model.logits(hidden).float().cpu()

    with compute_in_fp32(model):
        yield logits


class Answers(NamedTuple):
    """Logits (T, V) on each prompt, and the loss on the examples in nats per token."""

    logits: list[Tensor]
    loss: float | None

    @classmethod
    def of(cls, questions: Questions, opens: Opens) -> "Answers":
        with opens() as logits:
            prompts = [logits(ids) for ids in questions.prompts]
            losses = [_losses(logits, example) for example in questions.examples]
        loss = float(torch.cat(losses).double().mean()) if losses else None
        return cls(prompts, loss)


def _losses(logits: Logits, example: Encoded) -> Tensor:
    """Of the labels of an example, in nats."""
    trained = torch.tensor(example.trained[1:], dtype=torch.bool)
    labels = torch.tensor(example.ids[1:])[trained]
    return F.cross_entropy(logits(example.ids[:-1])[trained], labels, reduction="none")


def measure(
    job: Job, models: Mapping[str, Opens], round_matrix: Callable[[str, Tensor], None]
) -> Generator[Event, None, dict[str, Any]]:
    """Entries of the certificate for `models`, after GPTQ where it is asked for.

    `round_matrix` rounds the linear of a name for the Gram matrix of its inputs.
    """
    yield Progress(0, 1, "base + adapter")
    loaded = job.load(job.export.adapter)
    questions = Questions.of(loaded, job.into, job.export.prompts)
    if job.into.rounding == "gptq":
        widths = linear_widths(job.base, job.export.trust_remote_code)
        grams = input_grams(loaded.model, widths, questions.calibration)
        for done, (name, gram) in enumerate(grams, start=1):
            round_matrix(name, gram)
            yield Progress(done, len(widths), f"gptq {name}")
    del loaded
    yield Progress(0, 1, "comparing")
    return compare(
        questions,
        lambda: in_torch(job.load(None)),
        lambda: in_torch(job.load(job.export.adapter)),
        models,
    )


def compare(
    questions: Questions, base: Opens, tuned: Opens, quantized: Mapping[str, Opens]
) -> dict[str, Any]:
    """Entries of the certificate: each quantized model; that called base against the base.

    `kept`: (loss of the base − its loss) / (loss of the base − loss of base + adapter), None where
    that did not fall. One model is in memory at a time.
    """
    of_base, of_tuned = Answers.of(questions, base), Answers.of(questions, tuned)
    models = []
    for name, opens in quantized.items():
        found = Answers.of(questions, opens)
        reference = of_base if name == "base" else of_tuned
        difference = difference_of(zip(reference.logits, found.logits, strict=True))
        kept = _kept(of_base.loss, of_tuned.loss, found.loss)
        models.append({"model": name, **difference._asdict(), "loss": found.loss, "kept": kept})
    return {
        "models": models,
        "base_loss": of_base.loss,
        "tuned_loss": of_tuned.loss,
        "prompts_checked": len(questions.prompts),
        "examples_checked": len(questions.examples),
        "tokens_calibrated_on": sum(map(len, questions.calibration)),
    }


def _kept(base: float | None, tuned: float | None, loss: float | None) -> float | None:
    if base is None or tuned is None or loss is None or tuned >= base:
        return None
    return (base - loss) / (base - tuned)
