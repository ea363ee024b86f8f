"""A loaded model as lm-evaluation-harness's `LM`.

Its tokens, truncations and stop sequences are those of lm-eval's `hf` model.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError
from pipeline.inference.batching import BatchedGenerator, GeneratedToken, Generation
from pipeline.inference.completions import cache_tokens
from pipeline.inference.model_pool import ModelPool
from pipeline.inference.score import CHUNK
from pipeline.models.base import CausalLM, packed_hidden_states
from pipeline.models.device import fp64_device, read_numbers, to_device
from pipeline.models.generate import NOT_FINITE, Sampling

GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
# a request, and the ids of its context and its continuation
Tokenized = tuple[Any, list[int], list[int]]


class UnknownWords(UserError):
    """A word-level model cannot read a task."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """The model `name` of `pool`. Inputs are packed, and answers generated in batches.

    Generation also stops at the end-of-turn token of the chat template, as everywhere here.
    `truncated` counts the requests whose context was cut from the left.
    """

    def __init__(self, pool: ModelPool, name: str) -> None:
        super().__init__()
        self._pool, self._name = pool, name
        self.truncated = 0

    @property
    def _model(self) -> CausalLM:
        return self._pool.loaded(self._name).loaded.model

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._pool.loaded(self._name).loaded.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none: BOS, even if the tokenizer itself writes none."""
        tokenizer = self._tokenizer
        named = tokenizer.special_ids() if isinstance(tokenizer, SubwordTokenizer) else {}
        return named.get("bos", tokenizer.end_id)

    @property
    def max_length(self) -> int:
        return self._model.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if unknown := self._tokenizer.unknown_words(string):
            raise UnknownWords(
                f"{self._name} does not know: {', '.join(unknown)}. It is a word-level model."
            )
        if add_special_tokens is False:
            return list(self._tokenizer.spans(string)[0])
        return list(self._tokenizer.encode(string))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a prompt; without `add_generation_prompt` its last turn is open."""

        def render(messages: list[dict[str, str]]) -> str:
            if add_generation_prompt:
                return str(self._tokenizer.render(messages, True))
            return self._tokenizer.render(messages[:-1], True) + messages[-1]["content"]

        try:
            return render(chat_history)
        except UserError:  # many templates reject a system message
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return render(without)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether it is the greedy one."""
        # without lm-eval's progress bar
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Tokenized], **_: Any
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of ids."""
        # Choices that differ only in their last token, such as " A" and " B", have the same input.
        # It is read once.
        numbers_of: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (_request, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"A continuation has {len(continuation)} tokens; {self._name} takes 1 to "
                    f"{self.max_length}. Change doc_to_choice or doc_to_target of the task."
                )
            ids = (*context, *continuation)
            self.truncated += len(ids) > self.max_length + 1
            key = ids[-self.max_length - 1 : -1], len(continuation)
            numbers_of.setdefault(key, []).append(number)
        # what is too large fails first
        inputs = sorted(numbers_of, key=lambda key: len(key[0]), reverse=True)
        every = packed_hidden_states(self._model, [ids for ids, _length in inputs])
        # none where stderr is no terminal
        shown = tqdm(every, desc=self._name, total=len(inputs), disable=None)
        order, measured = list[int](), list[Tensor]()
        for key, hidden in zip(inputs, shown, strict=True):
            numbers = numbers_of[key]
            order += numbers
            continuations = torch.tensor([requests[number][2] for number in numbers])  # (M, T)
            measured.append(self._log_likelihoods(hidden[-key[1] :], continuations))
        # read at the end: until then a GPU is not waited for
        read = read_numbers(measured)
        if not all(map(math.isfinite, read)):
            raise UserError(NOT_FINITE)
        scored = zip(read[::2], (not others for others in read[1::2]), strict=True)
        answers = dict(zip(order, scored, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _log_likelihoods(self, hidden: Tensor, continuations: Tensor) -> Tensor:
        """(M, 2): the sum, NaN if logits are not finite, and how many tokens are not the likeliest.

        Of continuations (M, T) that the same hidden states (T, D) predict.
        """
        exact = fp64_device(hidden.device)
        total = torch.zeros(len(continuations), dtype=torch.float64, device=exact)
        others = torch.zeros_like(total)  # tokens that are not the likeliest
        predicted = torch.split(hidden, CHUNK)
        expected = torch.split(to_device(continuations, hidden.device).T, CHUNK)
        for rows, labels in zip(predicted, expected, strict=True):
            log_p = self._model.logits(rows).float().log_softmax(-1)  # (n, V)
            of_labels = log_p.gather(1, labels) + 0 * log_p.min()
            total += of_labels.to(exact).double().sum(0)
            others += (log_p.argmax(-1, keepdim=True) != labels).sum(0).to(exact)
        return torch.stack([total, others], 1)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood of each text; one that is too long is cut in windows without overlap."""
        windows: list[Tokenized] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            start = self.prefix_token_id
            for window in get_rolling_token_windows(ids, start, self.max_length, context_len=1):
                windows.append((number, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows)
        for (number, *_ids), (log_likelihood, _greedy) in zip(windows, scores, strict=True):
            totals[number] += log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Each answer up to its first stop sequence. Raises UserError for unsupported settings."""
        asked = [self._generation(number, request) for number, request in enumerate(requests)]
        answers = [_Answer(self._tokenizer, stops) for _generation, stops in asked]
        room = cache_tokens(self._model, [generation for generation, _stops in asked])
        generator = BatchedGenerator(self._pool, max_waiting=len(requests), max_tokens=room)
        try:
            for answer, (generation, _stops) in zip(answers, asked, strict=True):
                ticket = generator.submit(generation, answer.add, answer.ended.set_result)
                answer.cancel.set_result(ticket.cancel)
            for answer in tqdm(answers, desc=self._name, disable=None):
                if isinstance(reason := answer.ended.result(), Exception):
                    raise reason
        finally:
            generator.close()
        return [answer.text for answer in answers]

    def _generation(self, number: int, request: Any) -> tuple[Generation, list[str]]:
        """What to generate, and its stop sequences; `number` is the seed of what is sampled."""
        context, settings = request.args
        kwargs = normalize_gen_kwargs(settings, self.max_gen_toks)
        if others := [key for key in kwargs if key not in GENERATION]:
            raise UserError(
                f"{request.task_name}: generation_kwargs {', '.join(others)} is not supported. "
                f"Known: {', '.join(GENERATION)}. Remove it from the task."
            )
        limit = kwargs["max_gen_toks"]
        if not 0 < limit < self.max_length:
            raise UserError(
                f"{request.task_name}: max_gen_toks must be from 1 to {self.max_length - 1} for "
                f"{self._name}, got {limit}. Change it in generation_kwargs of the task."
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(ids) + limit > self.max_length
        temperature = kwargs["temperature"] if kwargs["do_sample"] else 0.0
        sampling = Sampling(
            temperature, kwargs.get("top_k", 0), kwargs.get("top_p", 1.0), seed=number
        )
        stops = [stop for stop in kwargs["until"] if stop]
        return Generation(self._name, tuple(ids[limit - self.max_length :]), limit, sampling), stops

    @property
    def max_gen_toks(self) -> int:
        """For a task that sets no limit."""
        return 256


class _Answer:
    """The tokens of one answer, which is cancelled after a stop sequence."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str]) -> None:
        self._tokenizer, self._stops, self._decode = tokenizer, stops, tokenizer.stream()
        self._ids, self._decoded = list[int](), ""
        self.cancel: Future[Callable[[], None]] = Future()
        self.ended: Future[str | Exception] = Future()

    def add(self, token: GeneratedToken) -> None:
        """Called on the generator's thread, which may be ahead of the one that sets `cancel`."""
        self._ids.append(token.id)
        self._decoded += self._decode(token.id)
        # A special token is left out of decoded text, but may be a stop sequence.
        word = self._tokenizer.word(token.id)
        if any(stop in self._decoded or stop == word for stop in self._stops):
            self.cancel.result()()

    @property
    def text(self) -> str:
        text: str = postprocess_generated_text(self._tokenizer.decode(self._ids), self._stops, None)
        return text
