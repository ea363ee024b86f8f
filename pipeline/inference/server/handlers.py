"""What the inference process answers to each request: the engine's functions on resident models."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.peft.updates import spectra
from pipeline.data.tokenizers import chat_template
from pipeline.errors import UserError
from pipeline.inference import attention_weights, engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.server.model_pool import ModelPool
from pipeline.inference.server.request import Request
from pipeline.models import device
from pipeline.models.generate import Sampling, finite, stream
from pipeline.models.load import count

Answer = dict[str, Any]  # with "event"
LONGEST_ATTENTION = 512  # tokens; its square of numbers is sent


class RequestHandler:
    """Answers to requests, in the protocol of `server.py`. Each raises UserError for what it refuses."""

    def __init__(self) -> None:
        self.models = ModelPool()
        self._whole: Mapping[str, Callable[[Request], Answer]] = {
            "load": self._load,
            "unload": self._unload,
            "top_k": self._top_k,
            "attention": self._attention,
            "spectrum": self._spectrum,
            "status": self._status,
        }

    def to(self, do: object, request: Request) -> Iterator[Answer]:
        """Every answer, the last with event "done"; the work goes on only as far as they are taken."""
        if do == "generate":
            yield from self._generate(request)
        elif isinstance(do, str) and do in self._whole:
            yield {"event": "done", **self._whole[do](request)}
        else:
            raise UserError(f"do is {do!r}; known are generate, {', '.join(self._whole)} and cancel.")

    def _load(self, request: Request) -> Answer:
        start = time.perf_counter()
        name = request.text("name")
        base, adapter = request.path("base"), request.optional_path("adapter")
        resident, was_there = self.models.load(name, base, adapter, request.flag("trust_remote_code"))
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

    def _unload(self, request: Request) -> Answer:
        name = request.text("name")
        self.models.unload(name)
        return {"name": name}

    def _top_k(self, request: Request) -> Answer:
        """Every model's likeliest tokens, and what each gives to the others'."""
        k, answers = request.integer("k"), dict[str, Answer]()
        asked: dict[str, tuple[LoadedModel, Tensor]] = {}
        for name in request.names("models"):
            try:
                loaded = self.models.get(name).at(request.strength(name))
                asked[name] = loaded, engine.next_probabilities(loaded, _prompt(loaded, request))
                choices = engine.top_tokens(loaded, asked[name][1], k)
                answers[name] = {"top_k": [{"token": c.token, "probability": c.probability} for c in choices]}
            except UserError as error:
                answers[name] = {"error": str(error)}
        tokens = dict.fromkeys(choice["token"] for answer in answers.values() for choice in answer.get("top_k", ()))
        for name, (loaded, probabilities) in asked.items():
            ids = {token: loaded.tokenizer.id_of_token(token) for token in tokens}
            answers[name]["of"] = {t: None if id_ is None else float(probabilities[id_]) for t, id_ in ids.items()}
        return {"answers": answers}

    def _generate(self, request: Request) -> Iterator[Answer]:
        start, loaded = time.perf_counter(), self._one(request)
        sampling = Sampling(
            request.number("temperature", 0.0),
            request.integer("top_k", 0),
            request.number("top_p", 1.0),
            request.integer("seed", 0),
        )
        prompt = engine.encode(loaded, _prompt(loaded, request))
        tokens, reason = 0, "length"
        ends, adds = loaded.tokenizer.end_ids, loaded.tokenizer.stream()
        for drawn in stream(loaded.model, prompt, ends, request.integer("limit", 20), sampling):
            if drawn.id in ends:
                reason = "end"
            else:
                tokens += 1
                yield {"event": "token", "text": adds(drawn.id), "probability": drawn.probability}
        yield {"event": "done", "reason": reason, "tokens": tokens, "seconds": time.perf_counter() - start}

    def _attention(self, request: Request) -> Answer:
        loaded = self._one(request)
        shape = loaded.model.shape
        layer, head = request.integer("layer"), request.integer("head")
        if layer >= shape.layers or head >= shape.heads:
            raise UserError(f"{loaded.name} has layers 0 to {shape.layers - 1} and heads 0 to {shape.heads - 1}.")
        ids = engine.encode(loaded, _prompt(loaded, request))
        if len(ids) > LONGEST_ATTENTION:
            raise UserError(f"The prompt has {len(ids)} tokens; attention is shown for up to {LONGEST_ATTENTION}.")
        weights = attention_weights.of_layer(loaded.model, torch.tensor([ids], device=loaded.model.device), layer)[
            0, head
        ]
        tokens = [loaded.tokenizer.word(id_) for id_ in ids]
        if virtual := loaded.model.virtual:
            tokens = [f"[{virtual.count} virtual]", *tokens]
            weights = attention_weights.with_virtual_as_one(weights, len(ids))
        return {
            "tokens": tokens,
            "weights": finite(weights).tolist(),
            "layers": shape.layers,
            "heads": shape.heads,
        }

    def _spectrum(self, request: Request) -> Answer:
        found = spectra(request.path("adapter"))
        return {"modules": [{**one._asdict(), "share_of_first": one.share_of_first} for one in found]}

    def _status(self, _: Request) -> Answer:
        return {**device.device_info(device.best_device()), "loaded": self.models.names, "pid": os.getpid()}

    def _one(self, request: Request) -> LoadedModel:
        return self.models.get(request.text("model")).at(request.strength())


def _prompt(loaded: LoadedModel, request: Request) -> str:
    text = request.text("text")
    return chat_template.render(loaded.base, text) if request.flag("chat") else text
