"""Requests of the inference process and their handlers: the engine's functions on loaded models."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.adapters.low_rank import spectra
from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError
from pipeline.files.text import abbreviate_repr
from pipeline.inference import engine
from pipeline.inference.chat import History, Message, fit_history
from pipeline.inference.engine import LoadedModel
from pipeline.inference.model_pool import ModelPool
from pipeline.models import device
from pipeline.models.generate import Sampling, finite, stream
from pipeline.models.load import count

Answer = dict[str, Any]  # with "event"
MAX_ATTENTION_TOKENS = 512  # the answer has this many numbers squared
ROLES = ("system", "user", "assistant")
MAX_MAP = 12  # tokens in a small map of a head; more are pooled
MAX_INTEGER = 2**62  # torch takes 64-bit integers, JSON any


class Request:
    """Fields by name. Every getter raises UserError with the field, the rule and the value."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def text(self, key: str) -> str:
        return self._text(key, self._fields.get(key))

    def messages(self) -> list[Message] | None:
        """The conversation, if the request has one."""
        value = self._fields.get("messages")
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(message, dict) for message in value)
        ):
            raise UserError(
                f"messages must be a list of objects, at least one, got {abbreviate_repr(value)}."
            )
        for n, message in enumerate(value):
            if message.get("role") not in ROLES:
                rule = f"messages[{n}].role must be one of {', '.join(ROLES)}"
                raise UserError(f"{rule}, got {abbreviate_repr(message.get('role'))}.")
        return [
            {
                "role": message["role"],
                "content": self._text(f"messages[{n}].content", message.get("content")),
            }
            for n, message in enumerate(value)
        ]

    def _text(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise UserError(f"{key} must be a string, got {value!r}.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key} must be valid Unicode, got an unpaired surrogate.") from None
        return value

    def path(self, key: str) -> Path:
        text = self.text(key)
        if "\0" in text:
            raise UserError(f"{key} must be a path without NUL, got {text!r}.")
        return Path(text)

    def optional_path(self, key: str) -> Path | None:
        return None if self._fields.get(key) is None else self.path(key)

    def names(self, key: str) -> list[str]:
        value = self._fields.get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{key} must be a list of names, got {value!r}.")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A non-negative integer."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
            raise UserError(f"{key} must be a whole number from 0, got {value!r}.")
        return value

    def number(self, key: str, default: float) -> float:
        return _number(key, self._value(key, default))

    def strength(self, name: str | None = None) -> float:
        """An adapter's strength, 0 to 2, default 1. With `name`, its entry in a mapping of
        strengths by model.
        """
        value = self._value("strength", 1.0 if name is None else {})
        if name is not None:
            if not isinstance(value, dict):
                raise UserError(f"strength must map models to numbers, got {value!r}.")
            value = value.get(name, 1.0)
        strength = _number("strength", value)
        if not 0 <= strength <= 2:
            raise UserError(f"strength must be from 0 to 2, got {value!r}.")
        return strength

    def flag(self, key: str) -> bool:
        """A boolean, default False."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, got {value!r}.")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self._fields.get(key)
        return default if value is None else value


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise UserError(f"{key} must be a number, got {value!r}.")


class RequestHandler:
    """Answers requests in the protocol of `server.py`: `ONE_ANSWER` names the methods that a
    request may call, besides `generate`. Each raises UserError for an invalid request."""

    ONE_ANSWER = ("load", "unload", "top_k", "attention", "attention_maps", "spectrum", "status")

    def __init__(self) -> None:
        self.models = ModelPool(parks=True)

    def answer(self, do: object, request: Request) -> Iterator[Answer]:
        """Yields the answers, the last with event "done"; works only as far as the caller
        iterates.
        """
        if do == "generate":
            yield from self.generate(request)
        elif isinstance(do, str) and do in self.ONE_ANSWER:
            yield {"event": "done", **getattr(self, do)(request)}
        else:
            raise UserError(
                f"do must be generate, {', '.join(self.ONE_ANSWER)} or cancel, got {do!r}."
            )

    def load(self, request: Request) -> Answer:
        start = time.perf_counter()
        name = request.text("name")
        base, adapter = request.path("base"), request.optional_path("adapter")
        resident, was_there = self.models.load(
            name, base, adapter, request.flag("trust_remote_code")
        )
        model = resident.loaded.model
        return {
            "name": name,
            "parameters": count(model)["total"],
            "seconds": time.perf_counter() - start,
            "chat": chat_template.has_template(resident.loaded.base),
            "layers": model.shape.layers,
            "heads": model.shape.heads,
            "resident": was_there,
        }

    def unload(self, request: Request) -> Answer:
        name = request.text("name")
        self.models.unload(name)
        return {"name": name}

    def top_k(self, request: Request) -> Answer:
        """Each model's most likely tokens, and ("of") its probability of every token that any model
        listed.
        """
        k, answers = request.integer("k"), dict[str, Answer]()
        # without the models: the next may need their memory
        predictions: dict[str, tuple[Tokenizer, Tensor]] = {}
        for name in request.names("models"):
            try:
                loaded = self.models.get(name).at(request.strength(name))
                probabilities = engine.next_probabilities(loaded, _render_prompt(loaded, request))
                predictions[name] = loaded.tokenizer, probabilities
                choices = engine.top_tokens(loaded, probabilities, k)
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
            ids = {token: tokenizer.id_of_token(token) for token in tokens}
            answers[name]["of"] = {
                t: None if id_ is None else float(probabilities[id_]) for t, id_ in ids.items()
            }
        return {"answers": answers}

    def generate(self, request: Request) -> Iterator[Answer]:
        start, loaded = time.perf_counter(), self._requested_model(request)
        sampling = Sampling(
            request.number("temperature", 0.0),
            request.integer("top_k", 0),
            request.number("top_p", 1.0),
            request.integer("seed", 0),
        )
        limit, messages = request.integer("limit", 20), request.messages()
        if messages is None:
            history = History(engine.encode(loaded, _render_prompt(loaded, request)))
        else:
            history = fit_history(loaded, messages, limit)
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
        for drawn in stream(loaded.model, history.ids, ends, limit, sampling):
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
        # The first token comes with the prompt; each later one, an end token too, is a step of its
        # own.
        steps = tokens - (reason == "length")
        rate = steps / (end - begun) if steps > 0 else None
        yield {
            "event": "done",
            "reason": reason,
            "tokens": tokens,
            "seconds": end - start,
            "tokens_per_second": rate,
        }

    def attention(self, request: Request) -> Answer:
        loaded = self._requested_model(request)
        shape = loaded.model.shape
        layer, head = request.integer("layer"), request.integer("head")
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

    def attention_maps(self, request: Request) -> Answer:
        """Small maps of all heads: `maps` of the model, for an adapter also of its `base` and of
        the `difference`, by layer and head; `change` is the share of a token's attention that the
        adapter moves, a mean over tokens."""
        model, strength = self.models.get(request.text("model")), request.strength()
        loaded = model.at(strength)
        ids = _attended(loaded, request)
        maps: dict[str, list[Any]] = {"maps": [], "base": [], "difference": [], "change": []}
        # one after the other: all at once may not fit in memory
        for layer in range(loaded.model.shape.layers):
            own = finite(_heads(model.at(strength), ids, layer))  # (H, T, T)
            maps["maps"].append(_small(own))
            if loaded.adapter is None:
                continue
            base = finite(_heads(model.at(0), ids, layer))
            # the adapter's virtual tokens, which the base has not
            more = own.shape[-1] - base.shape[-1]
            base = functional.pad(base, (more, 0, more, 0))
            maps["base"].append(_small(base))
            maps["difference"].append(_small(own - base))
            moved = (own - base)[:, more:].abs().sum(-1) / 2  # both rows sum to 1
            maps["change"].append(moved.mean(-1).tolist())
        return {"tokens": _attended_tokens(loaded, ids), **maps}

    def spectrum(self, request: Request) -> Answer:
        modules = spectra(request.path("adapter"))
        return {"modules": [{**m._asdict(), "share_of_first": m.share_of_first} for m in modules]}

    def status(self, _: Request) -> Answer:
        used = self.models.device or device.best_device()
        return {**device.device_info(used), "loaded": self.models.names, "pid": os.getpid()}

    def _requested_model(self, request: Request) -> LoadedModel:
        return self.models.get(request.text("model")).at(request.strength())


def _render_prompt(loaded: LoadedModel, request: Request) -> str:
    text = request.text("text")
    return chat_template.render(loaded.base, text) if request.flag("chat") else text


def _attended(loaded: LoadedModel, request: Request) -> Sequence[int]:
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
    weights = (
        engine.layer_attention(model, torch.tensor([ids], device=model.device), layer)[0]
        .float()
        .cpu()
    )
    if model.virtual:
        return torch.stack([engine.merge_virtual_tokens(head, len(ids)) for head in weights])
    return weights


def _small(heads: Tensor) -> list[list[list[float]]]:
    """(H, T, T) as at most (H, MAP, MAP): each number the one of its part that is furthest from
    zero.
    """
    size = min(heads.shape[-1], MAX_MAP)
    largest = functional.adaptive_max_pool2d(heads[None], size)[0]
    smallest = -functional.adaptive_max_pool2d(-heads[None], size)[0]
    small: list[list[list[float]]] = torch.where(largest >= -smallest, largest, smallest).tolist()
    return small
