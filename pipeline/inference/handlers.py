"""Answers the requests of the inference process from the models that it has loaded."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from torch import Tensor

from pipeline.adapters.low_rank import spectra
from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError
from pipeline.files.worker import Answer
from pipeline.inference import engine
from pipeline.inference.chat import History, fit_history
from pipeline.inference.engine import LoadedModel
from pipeline.inference.model_pool import ModelPool
from pipeline.inference.requests import (
    MAX_LOADED,
    Generate,
    Load,
    Spectrum,
    Status,
    TopK,
    Unload,
    parse,
)
from pipeline.models import device
from pipeline.models.generate import Sampling, stream
from pipeline.models.load import count

# a request's `do` → its class; RequestHandler has a method of the same name
KINDS: dict[str, type[Struct]] = {
    "generate": Generate,
    "load": Load,
    "unload": Unload,
    "top_k": TopK,
    "spectrum": Spectrum,
    "status": Status,
}


class RequestHandler:
    """Each method answers a request of its name, and raises UserError if it cannot."""

    def __init__(self) -> None:
        self.models = ModelPool(parks=True, most=MAX_LOADED)

    def answer(self, do: object, fields: Mapping[str, Any]) -> Iterator[Answer]:
        """Yields the answers to one request, the last with event "done"."""
        if not isinstance(do, str) or do not in KINDS:
            raise UserError(f"do must be {', '.join(KINDS)} or cancel, got {do!r}.")
        request = parse(KINDS[do], fields)
        if isinstance(request, Generate):
            yield from self.generate(request)
        else:
            yield {"event": "done", **getattr(self, do)(request)}

    def load(self, request: Load) -> Answer:
        start, before = time.perf_counter(), self.models.names
        resident, was_there = self.models.load(
            request.name,
            Path(request.base),
            None if request.adapter is None else Path(request.adapter),
            request.trust_remote_code,
        )
        model = resident.loaded.model
        return {
            "name": request.name,
            "parameters": count(model)["total"],
            "seconds": time.perf_counter() - start,
            "chat": chat_template.has_template(resident.loaded.base),
            "resident": was_there,
            "unloaded": [name for name in before if name not in self.models.names],
        }

    def unload(self, request: Unload) -> Answer:
        self.models.unload(request.name)
        return {"name": request.name}

    def top_k(self, request: TopK) -> Answer:
        """Each model's likeliest tokens; "of": its probability of each token that any listed."""
        answers = dict[str, Answer]()
        # without the models: the next may need their memory
        predictions: dict[str, tuple[Tokenizer, Tensor]] = {}
        for name in request.models:
            try:
                loaded = self.models.get(name).at(request.strength.get(name, 1.0))
                probabilities = engine.next_probabilities(loaded, _render_prompt(loaded, request))
                predictions[name] = loaded.tokenizer, probabilities
                choices = engine.top_tokens(loaded, probabilities, request.k)
                del loaded
                answers[name] = {
                    "top_k": [{"token": c.token, "probability": c.probability} for c in choices]
                }
            except UserError as error:  # of this model alone: the others still answer
                answers[name] = {"error": str(error)}
        # a second pass: a token that only one model listed has a probability in the others too
        tokens = dict.fromkeys(
            choice["token"] for answer in answers.values() for choice in answer.get("top_k", ())
        )
        for name, (tokenizer, probabilities) in predictions.items():
            of: dict[str, float | None] = {}
            for token in tokens:
                id_ = tokenizer.id_of_token(token)
                of[token] = None if id_ is None else float(probabilities[id_])
            answers[name]["of"] = of
        return {"answers": answers}

    def generate(self, request: Generate) -> Iterator[Answer]:
        start, loaded = time.perf_counter(), self._requested_model(request)
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        if request.messages is None:
            history = History(engine.encode(loaded, _render_prompt(loaded, request)))
        else:
            history = fit_history(loaded, msgspec.to_builtins(request.messages), request.limit)
            yield {
                "event": "prompt",
                "tokens": len(history.ids),
                "window": loaded.model.max_length,
                "cut_messages": history.cut_messages,
                "cut_tokens": history.cut_tokens,
                "opens_thought": history.opens_thought,
            }
        tokens, reason, begun = 0, "length", 0.0
        ends, decode_next = loaded.tokenizer.end_ids, loaded.tokenizer.stream()
        for drawn in stream(loaded.model, history.ids, ends, request.limit, sampling):
            begun = begun or time.perf_counter()
            if drawn.id in ends:
                reason = "end"
            else:
                tokens += 1
                # by a stream: a character may be spread over several tokens
                yield {
                    "event": "token",
                    "text": decode_next(drawn.id),
                    "probability": drawn.probability,
                }
        end = time.perf_counter()
        # Steps after the first, which is the prompt's. An end token takes a step, but is not in
        # `tokens`: the two cancel out.
        steps = tokens - 1 if reason == "length" else tokens
        rate = steps / (end - begun) if steps > 0 else None
        yield {
            "event": "done",
            "reason": reason,
            "tokens": tokens,
            "seconds": end - start,
            "tokens_per_second": rate,
        }

    def spectrum(self, request: Spectrum) -> Answer:
        modules = spectra(Path(request.adapter))
        return {"modules": [{**m._asdict(), "share_of_first": m.share_of_first} for m in modules]}

    def status(self, _: Status) -> Answer:
        used = self.models.device or device.best_device()
        return {**device.device_info(used), "loaded": self.models.names, "pid": os.getpid()}

    def _requested_model(self, request: Generate) -> LoadedModel:
        return self.models.get(request.model).at(request.strength)


def _render_prompt(loaded: LoadedModel, request: Generate | TopK) -> str:
    return chat_template.render(loaded.base, request.text) if request.chat else request.text
