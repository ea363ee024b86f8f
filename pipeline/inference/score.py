"""What a variant knows: losses, completions, kept answers, and how far it moved from the base."""

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

CHUNK = 256  # tokens whose logits are alive at once: all of an evaluation's would be many times the model


@dataclass(frozen=True)
class EvalScores:
    """Every next-token prediction on some examples: cross-entropies in nats (N,), first choices and labels (N,).

    `divergence` is the mean KL(base‖model) in nats a token. Hidden states and what makes logits of them are kept for
    the models that are compared with this one: far less than the logits themselves.
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
        """Share of first choices that are right."""
        return float((self.choices == self.labels).double().mean())


@torch.no_grad()
def score(loaded: LoadedModel, examples: Sequence[Example], base: EvalScores | None = None) -> EvalScores:
    """Each whole example with its end token, every token that is learned predicted from all before it.

    Raises UserError where `base` read the examples as other tokens: its predictions are then not comparable.
    """
    model, far = loaded.model, list[Tensor]()
    losses, choices, labels = list[Tensor](), list[Tensor](), list[Tensor]()
    encoded = [encode(example, loaded.tokenizer, 0, model.shape.positions) for example in examples]
    for number, (example, one) in enumerate(zip(examples, encoded, strict=True)):
        if base is not None and base.ids[number] != one.ids:
            raise UserError(
                f"{example.location}: {loaded.name} tokenizes it differently from the base. Remove the new tokens "
                "from it."
            )
    all_hidden = list(packed_hidden_states(model, [one.ids[:-1] for one in encoded]))
    for number, (one, hidden) in enumerate(zip(encoded, all_hidden, strict=True)):
        ids = torch.tensor(one.ids, device=model.device)
        wanted = torch.tensor(one.trained[1:], device=model.device)
        for rows in _chunks(len(hidden)):
            log_q = model.logits(hidden[rows]).float().log_softmax(-1)  # (n, V)
            chosen = wanted[rows]
            losses.append(F.nll_loss(log_q[chosen], ids[1:][rows][chosen], reduction="none").cpu())
            choices.append(log_q[chosen].argmax(dim=-1).cpu())
            labels.append(ids[1:][rows][chosen].cpu())
            if base is not None:
                log_p = base.logits(base.hidden[number][rows]).float().log_softmax(-1)  # its vocabulary may be smaller
                log_p = log_p.to(log_q.device)  # one of two large models may have found no room beside the other
                far.append((log_p.exp() * (log_p - log_q[:, : log_p.shape[-1]])).sum(dim=-1).cpu())
    divergence = float(torch.cat(far).mean()) if far else 0.0
    predicted = torch.cat(losses), torch.cat(choices), torch.cat(labels)
    return EvalScores(*predicted, divergence, [one.ids for one in encoded], all_hidden, model.logits)


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK))


@dataclass(frozen=True)
class AnswerScore:
    """How an answer follows a prompt: the probability of all its tokens together, None if the tokenizer cannot say it;
    whether the greedy completion begins so; and the likeliest next tokens."""

    probability: float | None
    first: bool
    top: list[TokenProbability]


@torch.no_grad()
def score_answers(loaded: LoadedModel, pairs: Sequence[tuple[str, str]], k: int = 1) -> list[AnswerScore]:
    """How each answer follows its prompt; all are read together. Raises UserError for a prompt that cannot be asked."""
    tokenizer, model = loaded.tokenizer, loaded.model
    asked = [encode_prompt(loaded, prompt) for prompt, _ in pairs]
    wanted = [tokenizer.continuation(prompt, answer) for prompt, answer in pairs]
    sequences = [(*ids, *answer[:-1]) for ids, answer in zip(asked, wanted, strict=True)]
    found = []
    for ids, answer, hidden in zip(asked, wanted, packed_hidden_states(model, sequences), strict=True):
        log_p = model.logits(hidden[len(ids) - 1 :]).float().log_softmax(-1).cpu()  # (tokens of the answer, V)
        top = top_tokens(loaded, finite(log_p[0]).exp(), k)
        if not answer:
            found.append(AnswerScore(None, False, top))
            continue
        tokens = torch.tensor(answer)
        each = log_p.gather(1, tokens[:, None])
        found.append(AnswerScore(float(each.sum().exp()), bool((log_p.argmax(dim=-1) == tokens).all()), top))
    return found


def completes_correctly(loaded: LoadedModel, example: Example, given: int) -> bool:
    """Does the greedy completion of an example's prompt, or its first `given` words, give the rest, and end there?"""
    prompt, rest = _asked(loaded, example, given)
    tokenizer = loaded.tokenizer
    limit = len(tokenizer.encode_following(rest)) + 4
    return tokenizer.normalize(complete(loaded, prompt, limit)) == tokenizer.normalize(rest)


def _asked(loaded: LoadedModel, example: Example, given: int) -> tuple[str, str]:
    if example.messages:
        *asked, answer = example.messages
        return loaded.tokenizer.render(asked, add_generation_prompt=True), answer["content"]
    if example.prompt is not None:
        return example.prompt, example.completion
    words = list(re.finditer(r"\S+", example.text))
    if given >= len(words):
        raise UserError(
            f"prompt_words is {given}, but {example.location} has {len(words)} words: nothing is left to say."
        )
    # The white space within the prompt is as in training; what stands between it and the rest is the model's to say.
    return example.text[: words[given - 1].end() if given else 0], example.text[words[given].start() :]
