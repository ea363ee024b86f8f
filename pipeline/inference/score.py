"""Scores of a model: losses, completions, expected answers, and its KL divergence from the base."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.examples import Example
from pipeline.data.masking import encode
from pipeline.errors import UserError
from pipeline.inference.engine import LoadedModel, TokenProbability, complete, top_tokens
from pipeline.inference.engine import encode as encode_prompt
from pipeline.models.base import packed_hidden_states
from pipeline.models.generate import finite

CHUNK = 256  # tokens whose logits are in memory at once; those of a whole evaluation exceed the model many times


@dataclass(frozen=True)
class EvalScores:
    """Next-token predictions on examples: cross-entropies in nats (N,), top-1 predictions (N,) and labels (N,).

    `divergence` is the mean KL(base‖model) in nats per token. To compare another model with this one, its
    logits are recomputed from `hidden`, which takes far less memory than keeping them.
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
        return math.exp(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of top-1 predictions that equal the label."""
        return float((self.choices == self.labels).double().mean())


@torch.no_grad()
def score(loaded: LoadedModel, examples: Sequence[Example], base: EvalScores | None = None) -> EvalScores:
    """Scores of every label of the examples, end tokens included; with `base`, the divergence from it.

    Raises UserError if `base` tokenized the examples differently, so that its predictions are not comparable.
    """
    model, divergences = loaded.model, list[Tensor]()
    losses, choices, labels = list[Tensor](), list[Tensor](), list[Tensor]()
    encoded = [encode(example, loaded.tokenizer, 0, model.shape.positions) for example in examples]
    for number, (example, encoding) in enumerate(zip(examples, encoded, strict=True)):
        if base is not None and base.ids[number] != encoding.ids:
            raise UserError(
                f"{example.location}: {loaded.name} tokenizes it differently from the base. Remove the new tokens "
                "from it."
            )
    all_hidden = list(packed_hidden_states(model, [encoding.ids[:-1] for encoding in encoded]))
    for number, (encoding, hidden) in enumerate(zip(encoded, all_hidden, strict=True)):
        ids = torch.tensor(encoding.ids, device=model.device)
        labelled = torch.tensor(encoding.trained[1:], device=model.device)
        for rows in _chunks(len(hidden)):
            log_q = model.logits(hidden[rows]).float().log_softmax(-1)  # (n, V)
            mask = labelled[rows]
            losses.append(F.nll_loss(log_q[mask], ids[1:][rows][mask], reduction="none").cpu())
            choices.append(log_q[mask].argmax(dim=-1).cpu())
            labels.append(ids[1:][rows][mask].cpu())
            if base is not None:
                log_p = base.logits(base.hidden[number][rows]).float().log_softmax(-1)  # its vocabulary may be smaller
                log_p = log_p.to(log_q.device)  # two large models may not fit on one device
                divergences.append((log_p.exp() * (log_p - log_q[:, : log_p.shape[-1]])).sum(dim=-1).cpu())
    divergence = float(torch.cat(divergences).mean()) if divergences else 0.0
    predicted = torch.cat(losses), torch.cat(choices), torch.cat(labels)
    return EvalScores(*predicted, divergence, [encoding.ids for encoding in encoded], all_hidden, model.logits)


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK))


@dataclass(frozen=True)
class AnswerScore:
    """Joint probability of an answer's tokens after a prompt (None if it has no tokens), whether the greedy
    completion begins with it, and the most likely next tokens."""

    probability: float | None
    first: bool
    top: list[TokenProbability]


@torch.no_grad()
def score_answers(loaded: LoadedModel, pairs: Sequence[tuple[str, str]], k: int = 1) -> list[AnswerScore]:
    """Scores of (prompt, answer) pairs, computed as packed sequences. Raises UserError as `engine.encode`."""
    tokenizer, model = loaded.tokenizer, loaded.model
    prompts = [encode_prompt(loaded, prompt) for prompt, _ in pairs]
    answers = [tokenizer.continuation(prompt, answer) for prompt, answer in pairs]
    sequences = [(*ids, *answer[:-1]) for ids, answer in zip(prompts, answers, strict=True)]
    scores = []
    for ids, answer, hidden in zip(prompts, answers, packed_hidden_states(model, sequences), strict=True):
        log_p = model.logits(hidden[len(ids) - 1 :]).float().log_softmax(-1).cpu()  # (tokens of the answer, V)
        top = top_tokens(loaded, finite(log_p[0]).exp(), k)
        if not answer:
            scores.append(AnswerScore(None, False, top))
            continue
        tokens = torch.tensor(answer)
        token_log_p = log_p.gather(1, tokens[:, None])
        scores.append(AnswerScore(float(token_log_p.sum().exp()), bool((log_p.argmax(dim=-1) == tokens).all()), top))
    return scores


def completes_correctly(loaded: LoadedModel, example: Example, given: int) -> bool:
    """Whether the greedy completion of an example's prompt (of a text: its first `given` words) is exactly the rest."""
    prompt, rest = _split_prompt(loaded, example, given)
    tokenizer = loaded.tokenizer
    limit = len(tokenizer.encode_following(rest)) + 4
    return tokenizer.normalize(complete(loaded, prompt, limit)) == tokenizer.normalize(rest)


def _split_prompt(loaded: LoadedModel, example: Example, given: int) -> tuple[str, str]:
    if example.messages:
        *turns, answer = example.messages
        return loaded.tokenizer.render(turns, add_generation_prompt=True), answer["content"]
    if example.prompt is not None:
        return example.prompt, example.completion
    words = list(re.finditer(r"\S+", example.text))
    if given >= len(words):
        raise UserError(f"prompt_words is {given}, but {example.location} has {len(words)} words. Lower it.")
    # The prompt keeps its inner white space, as in training; the white space behind it is up to the model.
    return example.text[: words[given - 1].end() if given else 0], example.text[words[given].start() :]
