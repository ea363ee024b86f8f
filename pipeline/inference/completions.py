"""The completions of many prompts by one model, computed in batches."""

from collections.abc import Sequence
from concurrent.futures import Future

from pipeline.inference import engine
from pipeline.inference.batching import (
    BatchedGenerator,
    GeneratedToken,
    Generation,
)
from pipeline.inference.engine import LoadedModel
from pipeline.inference.model_pool import ModelPool
from pipeline.models.base import CausalLM
from pipeline.models.device import device_limits
from pipeline.models.generate import cache_room


def complete_all(
    loaded: LoadedModel,
    prompts: Sequence[str],
    limit: int | Sequence[int],
    stops: Sequence[str] = (),
) -> list[str]:
    """The greedy continuation of each prompt, without white space around it.

    It stops at an end token, at the first of `stops`, or after `limit` tokens, which may be a
    limit for each prompt. Raises UserError as `engine.encode`.
    """
    limits = [limit] * len(prompts) if isinstance(limit, int) else limit
    requests = [
        Generation(loaded.name, engine.encode(loaded, prompt), most)
        for prompt, most in zip(prompts, limits, strict=True)
    ]
    pool = ModelPool()
    pool.add(loaded)
    # Here and not on a thread: which prompts share a forward, and so the last bits of their logits,
    # is always the same.
    generator = BatchedGenerator(
        pool, None, len(requests), cache_tokens(loaded.model, requests), threaded=False
    )
    texts = [_submit(generator, loaded, request, stops) for request in requests]
    generator.run_all()
    return [text.result() for text in texts]


def cache_tokens(model: CausalLM, requests: Sequence[Generation]) -> int:
    """Tokens in the cache at once: as many as fit into memory, and at least the longest request."""
    longest = max((len(request.ids) + request.limit for request in requests), default=0)
    return max(longest, min(4096 * device_limits(model.device).sequences, cache_room(model)))


def _submit(
    generator: BatchedGenerator, loaded: LoadedModel, request: Generation, stops: Sequence[str]
) -> "Future[str]":
    """The text that a request will give."""
    done, decode_next = Future[str](), loaded.tokenizer.stream()
    text = ""

    def first_stop() -> int:
        """Where the text ends."""
        starts = [text.find(stop) for stop in stops]
        return min((start for start in starts if start >= 0), default=len(text))

    def on_token(token: GeneratedToken) -> None:
        nonlocal text
        text += decode_next(token.id)
        if first_stop() < len(text):
            ticket.cancel()

    def on_end(reason: str | Exception) -> None:
        if isinstance(reason, Exception):
            done.set_exception(reason)
        else:
            done.set_result(text[: first_stop()].strip())

    ticket = generator.submit(request, on_token, on_end)
    return done
