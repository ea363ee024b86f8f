"""Answers the requests of the inference process from the models that it has loaded."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor
from torch.nn import functional

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
    Attention,
    AttentionMaps,
    Generate,
    Load,
    Spectrum,
    Status,
    TopK,
    Unload,
    parse,
)
from pipeline.models import device
from pipeline.models.generate import Sampling, finite, stream
from pipeline.models.load import count

MAX_ATTENTION_TOKENS = 512  # the answer has this many numbers squared
MAX_MAP = 12  # tokens in a small map of a head; more are pooled
# a request's `do` → its class; RequestHandler has a method of the same name
KINDS: dict[str, type[Struct]] = {
    "generate": Generate,
    "load": Load,
    "unload": Unload,
    "top_k": TopK,
    "attention": Attention,
    "attention_maps": AttentionMaps,
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
            "layers": model.shape.layers,
            "heads": model.shape.heads,
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

    def attention(self, request: Attention) -> Answer:
        loaded = self._requested_model(request)
        shape, layer, head = loaded.model.shape, request.layer, request.head
        if layer >= shape.layers or head >= shape.heads:
            raise UserError(
                f"{loaded.name} has layers 0 to {shape.layers - 1} and heads 0 to "
                f"{shape.heads - 1}."
            )
        ids = _attended(loaded, request)
        return {
            "tokens": _attended_tokens(loaded, ids),
            "weights": finite(_heads(loaded, ids, layer)[head]).tolist(),
            "layers": shape.layers,
            "heads": shape.heads,
        }

    def attention_maps(self, request: AttentionMaps) -> Answer:
        """Small maps of all heads by layer: of the model, and for an adapter what it changes.

        An adapter also has the maps of its `base` and of the `difference`; `change` is the
        share of a token's attention that the adapter moves, a mean over tokens.
        """
        model, strength = self.models.get(request.model), request.strength
        loaded = model.at(strength)
        ids = _attended(loaded, request)
        maps: dict[str, list[Any]] = {"maps": [], "base": [], "difference": [], "change": []}
        # one after the other: all at once may not fit in memory
        for layer in range(loaded.model.shape.layers):
            heads = finite(_heads(model.at(strength), ids, layer))  # (H, T, T)
            maps["maps"].append(_small(heads))
            if loaded.adapter is None:
                continue
            base = finite(_heads(model.at(0), ids, layer))
            # the adapter's virtual tokens, which the base has not
            more = heads.shape[-1] - base.shape[-1]
            base = functional.pad(base, (more, 0, more, 0))
            maps["base"].append(_small(base))
            maps["difference"].append(_small(heads - base))
            moved = (heads - base)[:, more:].abs().sum(-1) / 2  # rows sum to 1
            maps["change"].append(moved.mean(-1).tolist())
        return {"tokens": _attended_tokens(loaded, ids), **maps}

    def spectrum(self, request: Spectrum) -> Answer:
        modules = spectra(Path(request.adapter))
        return {"modules": [{**m._asdict(), "share_of_first": m.share_of_first} for m in modules]}

    def status(self, _: Status) -> Answer:
        used = self.models.device or device.best_device()
        return {**device.device_info(used), "loaded": self.models.names, "pid": os.getpid()}

    def _requested_model(self, request: Generate | AttentionMaps) -> LoadedModel:
        return self.models.get(request.model).at(request.strength)


def _render_prompt(loaded: LoadedModel, request: Generate | TopK | AttentionMaps) -> str:
    return chat_template.render(loaded.base, request.text) if request.chat else request.text


def _attended(loaded: LoadedModel, request: AttentionMaps) -> Sequence[int]:
    """The prompt's ids. Raises UserError if there are too many to show."""
    ids = engine.encode(loaded, _render_prompt(loaded, request))
    if len(ids) > MAX_ATTENTION_TOKENS:
        raise UserError(
            f"The prompt has {len(ids)} tokens; attention is shown for up to "
            f"{MAX_ATTENTION_TOKENS}."
        )
    return ids


def _attended_tokens(loaded: LoadedModel, ids: Sequence[int]) -> list[str]:
    tokens = [loaded.tokenizer.word(id_) for id_ in ids]
    return [f"[{virtual.count} virtual]", *tokens] if (virtual := loaded.model.virtual) else tokens


def _heads(loaded: LoadedModel, ids: Sequence[int], layer: int) -> Tensor:
    """The weights of a layer's heads, (H, T, T); virtual tokens are one token, the first."""
    model = loaded.model
    weights = engine.layer_attention(model, torch.tensor([ids], device=model.device), layer)
    weights = weights[0].float().cpu()
    if model.virtual:
        return torch.stack([engine.merge_virtual_tokens(head, len(ids)) for head in weights])
    return weights


def _small(heads: Tensor) -> list[list[list[float]]]:
    """(H, T, T) pooled to at most (H, MAX_MAP, MAX_MAP); of each part what is furthest from 0."""
    size = min(heads.shape[-1], MAX_MAP)
    largest = functional.adaptive_max_pool2d(heads[None], size)[0]
    smallest = -functional.adaptive_max_pool2d(-heads[None], size)[0]
    small: list[list[list[float]]] = torch.where(largest >= -smallest, largest, smallest).tolist()
    return small
