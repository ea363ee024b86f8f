"""Scores of a model: losses, answers, divergence from the base, agreement with another model."""

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.adapters.folder import quantization_of
from pipeline.data.answers.questions import prompt_and_answer
from pipeline.data.examples import Example
from pipeline.data.masking import Encoder, encode
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.files.text import abbreviate_repr
from pipeline.inference.engine import (
    LoadedModel,
    TokenProbability,
    complete,
    free,
    load,
)
from pipeline.inference.engine import encode as encode_prompt
from pipeline.inference.model_pool import ModelPool
from pipeline.models.base import compute_in_fp32, packed_hidden_states
from pipeline.models.device import read_numbers, to_device
from pipeline.models.generate import NOT_FINITE
from pipeline.project.new_project import DEFAULTS
from pipeline.project.params.sections import Quantization

# tokens whose logits are in memory at once; those of a whole evaluation are many times the model
CHUNK = 256


@dataclass(frozen=True)
class EvalScores:
    """Next-token predictions on examples: losses in nats, top-1 predictions and labels, each (N,).

    `divergence` is the mean KL(base‖model) in nats per token. To compare another model with this
    one, `logits` computes this one's logits again from `hidden`: it needs the model's head alone,
    and hidden states take far less memory than logits.
    """

    losses: Tensor
    choices: Tensor
    labels: Tensor
    divergence: float
    ids: list[tuple[int, ...]] = field(repr=False)
    hidden: list[Tensor] = field(repr=False)
    logits: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """Infinite where the loss is so large that its exponential is no number."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def accuracy(self) -> float:
        """Share of top-1 predictions that equal the label."""
        return agreement(self.choices, self.labels)


def agreement(choices: Tensor, others: Tensor) -> float:
    """Share of top-1 predictions (N,) that equal another model's, or the labels."""
    return float((choices == others).double().mean())


@torch.no_grad()
def score(
    loaded: LoadedModel,
    examples: Sequence[Example],
    base: EvalScores | None = None,
    max_length: int = 0,
) -> EvalScores:
    """Scores of every label of the examples, end tokens included.

    `base`: also the divergence from it.

    `max_length`: as in training, examples are cut to this many tokens; 0: never.

    Raises UserError if `base` tokenized the examples differently, so that its predictions are not
    comparable.
    """
    model = loaded.model
    losses, choices, divergences = list[Tensor](), list[Tensor](), list[Tensor]()
    labels = list[int]()
    virtual = 0 if model.virtual is None else model.virtual.count
    encoder = Encoder(loaded.tokenizer, max_length, model.shape.positions, virtual)
    encoded = [encoder(example) for example in examples]
    for number, (example, encoding) in enumerate(zip(examples, encoded, strict=True)):
        if base is not None and base.ids[number] != encoding.ids:
            raise UserError(
                f"{example.location}: {loaded.name} tokenizes it differently from the base. Remove "
                "the new tokens from it."
            )
    all_hidden = list(packed_hidden_states(model, [encoding.ids[:-1] for encoding in encoded]))
    for number, (encoding, hidden) in enumerate(zip(encoded, all_hidden, strict=True)):
        labelled = [t for t, trained in enumerate(encoding.trained[1:]) if trained]
        targets = [encoding.ids[t + 1] for t in labelled]
        labels += targets
        index, wanted = to_device(
            torch.tensor([[t % CHUNK for t in labelled], targets], dtype=torch.int64), model.device
        )
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            here = slice(bisect_left(labelled, start), bisect_left(labelled, start + CHUNK))
            log_q = model.logits(hidden[rows]).float().log_softmax(-1)  # (n, V)
            of_labels = log_q.index_select(0, index[here])
            losses.append(F.nll_loss(of_labels, wanted[here], reduction="none"))
            choices.append(of_labels.argmax(dim=-1))
            if base is not None:
                log_p = base.logits(base.hidden[number][rows]).float().log_softmax(-1)
                log_p = log_p.to(log_q.device)  # two large models may not fit on one device
                # the base's vocabulary may be smaller
                difference = log_p - log_q[:, : log_p.shape[-1]]
                divergences.append((log_p.exp() * difference).sum(dim=-1))  # (n,)
    # read at the end: until then a GPU is not waited for
    divergence = float(torch.cat(divergences).cpu().mean()) if divergences else 0.0
    predicted = (
        torch.cat(losses).cpu(),
        torch.cat(choices).cpu(),
        torch.tensor(labels, dtype=torch.int64),
    )
    return EvalScores(
        *predicted, divergence, [encoding.ids for encoding in encoded], all_hidden, model.logits
    )


@dataclass(frozen=True)
class AnswerScore:
    """How likely an answer is after a prompt.

    `probability`: of all its tokens, or None if it has none. `first`: whether the greedy completion
    begins with the answer. `top`: the likeliest next tokens. The probability of a long answer may
    be 0, its logarithm is not.
    """

    probability: float | None
    first: bool
    top: list[TokenProbability]
    log_probability: float | None = None  # nats


@torch.no_grad()
def score_answers(
    loaded: LoadedModel, pairs: Sequence[tuple[str, str]], k: int = 1
) -> list[AnswerScore]:
    """Scores of (prompt, answer) pairs, computed in packed rows. Raises UserError."""
    tokenizer, model = loaded.tokenizer, loaded.model
    prompts = [encode_prompt(loaded, prompt) for prompt, _ in pairs]
    answers = [tokenizer.continuation(prompt, answer) for prompt, answer in pairs]
    sequences = [(*ids, *answer[:-1]) for ids, answer in zip(prompts, answers, strict=True)]
    for (prompt, _), sequence in zip(pairs, sequences, strict=True):
        if len(sequence) > model.max_length:
            raise UserError(
                f"The prompt {abbreviate_repr(prompt)} and its answer without the last token have "
                f"{len(sequence)} tokens; {loaded.name} takes {model.max_length}. Shorten them."
            )
    k, measured = min(k, len(tokenizer)), list[Tensor]()
    for ids, answer, hidden in zip(
        prompts, answers, packed_hidden_states(model, sequences), strict=True
    ):
        tokens = to_device(torch.tensor(answer, dtype=torch.int64), model.device)
        # the prompt's last token predicts the answer's first
        log_p = model.logits(hidden[len(ids) - 1 :]).float().log_softmax(-1)  # (n, V)
        of_answer = log_p[: len(answer)]  # none if it is empty
        total = of_answer.gather(1, tokens[:, None]).sum()
        first = (of_answer.argmax(dim=-1) == tokens).all()
        measured += [log_p[0].min(), total, total.exp(), first, *log_p[0].exp().topk(k)]
    # read at the end: until then a GPU is not waited for
    numbers, scores = iter(read_numbers(measured)), []
    for answer in answers:
        least, log_probability, probability, greedy, *values = islice(numbers, 4 + k)
        if not math.isfinite(least):
            raise UserError(NOT_FINITE)
        words = [tokenizer.word(int(id_)) for id_ in islice(numbers, k)]
        top = [*map(TokenProbability, words, values)]
        scored = AnswerScore(probability, bool(greedy), top, log_probability)
        scores.append(scored if answer else AnswerScore(None, False, top))
    return scores


def completes_correctly(loaded: LoadedModel, example: Example, given: int) -> bool:
    """Whether the greedy completion of an example's prompt is exactly the rest.

    The prompt of a text is its first `given` words.
    """
    tokenizer = loaded.tokenizer
    prompt: str
    if asked := prompt_and_answer(example, tokenizer):
        prompt, rest = asked
    else:
        words = list(re.finditer(r"\S+", example.text))
        if given >= len(words):
            raise UserError(
                f"prompt_words is {given}, but {example.location} has {len(words)} words. Lower it."
            )
        # The prompt keeps its inner white space, as in training; the white space behind it is up to
        # the model.
        prompt, rest = (
            example.text[: words[given - 1].end() if given else 0],
            example.text[words[given].start() :],
        )
    limit = len(tokenizer.encode_following(rest)) + 4
    return tokenizer.normalize(complete(loaded, prompt, limit)) == tokenizer.normalize(rest)


@dataclass(frozen=True)
class SameLogits:
    """Checks that a merged checkpoint gives the same logits as base + adapter, up to `limit`.

    Without prompts no model is loaded.
    """

    base: Path
    adapter: Path
    prompts: Sequence[str]
    limit: float = torch.inf
    trust_remote_code: bool = False

    def __call__(self, merged: Path) -> dict[str, Any]:
        """Entries for the certificate. Raises UserError above `limit`."""
        if not self.prompts:
            return {}
        base, adapter, prompts = self.base, self.adapter, self.prompts
        tuned = self._load(base, adapter)
        result = difference(tuned, self._load(merged), prompts)
        if not result.max_logit_difference <= self.limit:  # refuses NaN too
            raise UserError(
                "merge refused: the merged model's logits differ from base + adapter by "
                f"{result.max_logit_difference:.1e}, more than merge.max_logit_difference "
                f"{self.limit:.1e}. Raise it if that is acceptable."
            )
        certificate = result._asdict() | {"prompts_checked": len(prompts)}
        quantization = quantization_of(adapter)
        if quantization != "none":
            # How much of the difference is due to quantization: with the adapter, and without it.
            unquantized = difference(tuned, self._load(base, adapter, quantization="none"), prompts)
            certificate |= {
                "trained_on": quantization,
                "merged_on_stored_weights": unquantized._asdict(),
            }
            free(tuned)
            base_alone = difference(
                self._load(base), self._load(base, quantization=quantization), prompts
            )
            certificate["quantization_alone"] = base_alone._asdict()
        return certificate

    def _load(
        self, folder: Path, adapter: Path | None = None, quantization: Quantization | None = None
    ) -> LoadedModel:
        return load(
            folder, adapter, trust_remote_code=self.trust_remote_code, quantization=quantization
        )


class Difference(NamedTuple):
    """How much two models' logits differ on prompts.

    The largest absolute difference, the mean KL(one‖other) in nats per token, and the number of
    prompts with the same top-1 next token.
    """

    max_logit_difference: float
    divergence: float
    same_first_choices: int


@torch.no_grad()
def difference(one: LoadedModel, other: LoadedModel, texts: Sequence[str]) -> Difference:
    """Difference of two models on `texts`, computed in fp32 so that rounding does not count."""
    # texts may have unknown words
    ids = [one.tokenizer.encode(text)[: one.model.shape.positions] for text in texts]
    with compute_in_fp32(one.model), compute_in_fp32(other.model):
        hidden = zip(
            packed_hidden_states(one.model, ids),
            packed_hidden_states(other.model, ids),
            strict=True,
        )
        return difference_of(
            (one.model.logits(h).float(), other.model.logits(k).float()) for h, k in hidden
        )


def difference_of(logits: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """Difference of two models by their logits (T, V) on each prompt."""
    largest, divergences, same = list[Tensor](), list[Tensor](), 0
    for p, q in logits:
        q = q.to(p.device)
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        largest.append((p - q).abs().max())
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same += int(p[-1].argmax() == q[-1].argmax())
    # torch's max, since Python's ignores NaN
    return Difference(float(torch.stack(largest).max()), float(torch.cat(divergences).mean()), same)


def builtin_prompts() -> list[str]:
    """Everyday English: single sentences, and a longer text, for later positions."""
    lines = (DEFAULTS / "data/heldout.en.txt").read_text(encoding="utf-8").splitlines()
    return [*lines[:16], " ".join(lines[16:])]


class Quality(NamedTuple):
    """Loss in nats per token, and top-1 accuracy against the labels and against the tuned model."""

    loss: float
    right: float
    as_tuned: float


def refuse_other_tokens(base: Path, tuned: Path, examples: Sequence[Example]) -> None:
    """Raises UserError if the two tokenize an example differently: nothing could be compared."""
    tokenizers = [load_tokenizer(folder) for folder in (base, tuned)]
    for example in examples:
        encodings = [encode(example, tokenizer) for tokenizer in tokenizers]
        of_base, of_tuned = (
            list(zip(encoded.ids, encoded.trained, strict=True)) for encoded in encodings
        )
        if of_base != of_tuned:
            pairs = enumerate(zip_longest(of_base, of_tuned), start=1)
            number = next(n for n, (token, theirs) in pairs if token != theirs)
            raise UserError(
                f"{example.location}: {base} and {tuned} must tokenize it identically, but differ "
                f"in token {number} of {len(of_base)} and {len(of_tuned)}. Give both the same "
                "tokenizer and chat template, or omit --data."
            )


def quality(
    base: Path,
    tuned: Path,
    adapter: Path,
    examples: Sequence[Example],
    trust_remote_code: bool = False,
) -> dict[str, Quality]:
    """Quality of base, fine-tuned model and base + adapter, of which one is in memory at a time."""
    models = {"base": (base, None), "tuned": (tuned, None), "base + LoRA": (base, adapter)}
    scores = {}
    for loaded in ModelPool().in_turn(models, trust_remote_code):
        scored = score(loaded, examples)
        scores[loaded.name] = (scored.loss, scored.accuracy, scored.choices)
    results = {}
    for name in models:
        loss, right, choices = scores[name]
        results[name] = Quality(loss, right, agreement(choices, scores["tuned"][2]))
    return results


class Cost(NamedTuple):
    """Loss in nats per token, top-1 accuracy, and the divergence from the reference."""

    loss: float
    right: float
    divergence: float


def costs(
    base: Path,
    adapters: Mapping[str, Path | None],
    examples: Sequence[Example],
    trust_remote_code: bool = False,
) -> dict[str, Cost]:
    """What each adapter costs on the examples against the first; None is the base alone.

    One model is in memory at a time, and the head of the first.
    """
    reference: EvalScores | None = None
    results = {}
    models = {name: (base, adapter) for name, adapter in adapters.items()}
    for loaded in ModelPool().in_turn(models, trust_remote_code):
        scored = score(loaded, examples, reference)
        reference = reference or scored
        results[loaded.name] = Cost(scored.loss, scored.accuracy, scored.divergence)
    return {name: results[name] for name in adapters}
