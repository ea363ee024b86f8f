"""Answers of the request handlers, and the errors of invalid requests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.adapters.config import WEIGHTS, AdapterSpec
from pipeline.errors import UserError
from pipeline.inference.handlers import RequestHandler
from pipeline.inference.requests import MAX_LOADED
from pipeline.models import device
from tests.helpers.checkpoints import adapter

Answer = dict[str, Any]


@pytest.fixture
def handler(endless: Path) -> RequestHandler:
    handler = RequestHandler()
    handler.models.load("m", endless, None)
    return handler


GENERATE = {"do": "generate", "model": "m", "text": "w1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do": "dance"}, r"do must be generate, load, .* or cancel, got 'dance'"),
        ({"do": None}, r"do must be generate, .* got None"),
        ({"do": "load", "base": "x"}, r"name is missing. Add it to the request"),
        (
            {"do": "load", "name": "x", "base": 5},
            r"base: expected `str`, got `int`. Correct it in the request",
        ),
        (
            {"do": "load", "name": "x", "base": "a\0b"},
            r"base: expected `str` matching .*, got 'a\\x00b'",
        ),
        ({"do": "load", "name": "x", "base": "/nowhere"}, r"/nowhere is not a model folder"),
        ({"do": "unload", "name": "x"}, r"x is not loaded. Loaded: m\."),
        (
            {"do": "top_k", "models": "m", "text": "w1", "k": 1},
            r"models: expected `array`, got `str`",
        ),
        (
            {"do": "top_k", "models": ["m"], "text": "w1", "k": -1},
            r"k: expected `int` >= 0, got -1",
        ),
        ({**GENERATE, "text": "w1 \ud800"}, r"text must be valid Unicode"),
        ({**GENERATE, "text": "w1 nowhere"}, r"m does not know: nowhere"),
        ({**GENERATE, "limit": True}, r"limit: expected `int`, got `bool`"),
        ({**GENERATE, "temperature": "hot"}, r"temperature: expected `float`, got `str`"),
        ({**GENERATE, "temperature": 10**400}, r"temperature: number out of range"),
        ({**GENERATE, "temperature": -1}, r"sampling needs temperature at least 0"),
        ({**GENERATE, "strength": 2.1}, r"strength: expected `float` <= 2.0, got 2.1"),
        ({**GENERATE, "strength": float("nan")}, r"strength: expected `float` >= 0.0, got nan"),
        ({**GENERATE, "chat": True}, r"has no chat template"),
        ({**GENERATE, "chat": 1}, r"chat: expected `bool`, got `int`"),
        ({"do": "spectrum", "adapter": "/nowhere"}, r"/nowhere/adapter_config.json: No such file"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_its_reason(
    handler: RequestHandler, fields: Answer, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(handler.answer(fields["do"], fields))


def filled(folder: Path, base: Path, value: float) -> Path:
    """An adapter with all weights equal to `value`."""
    adapter(folder, base, AdapterSpec(2, 2.0, ("fc1",)))
    weights = {
        key: torch.full_like(tensor, value) for key, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("do", ["load", "spectrum"])
def test_an_adapter_that_is_not_finite_is_refused(
    handler: RequestHandler, endless: Path, tmp_path: Path, do: str, value: float
) -> None:
    folder = filled(tmp_path / "wild", endless, value)
    with pytest.raises(UserError, match=r"lora_A.weight is not finite. Train the adapter again"):
        list(handler.answer(do, {"name": "wild", "base": str(endless), "adapter": str(folder)}))


def test_a_model_that_overflows_is_refused_and_the_base_answers(
    handler: RequestHandler, endless: Path, tmp_path: Path
) -> None:
    handler.models.load("wild", endless, filled(tmp_path / "wild", endless, 1e30))
    asked = {
        "model": "wild",
        "text": "w1",
        "models": ["wild", "m"],
        "k": 1,
        "temperature": 1,
    }
    with pytest.raises(UserError, match="The model's outputs are not finite"):
        list(handler.answer("generate", asked))
    (done,) = handler.answer("top_k", asked)
    assert "are not finite" in done["answers"]["wild"]["error"]
    assert len(done["answers"]["m"]["top_k"]) == 1


def test_one_model_that_cannot_answer_does_not_silence_the_others(handler: RequestHandler) -> None:
    fields = {"models": ["m", "gone"], "text": "w1", "k": 2, "strength": {"m": 0.5, "gone": 1}}
    (done,) = handler.answer("top_k", fields)
    assert len(done["answers"]["m"]["top_k"]) == 2
    assert done["answers"]["gone"] == {"error": "gone is not loaded. Loaded: m."}


def test_a_token_that_a_model_lacks_has_no_probability_there(
    handler: RequestHandler, finished: Path
) -> None:
    handler.models.load("german", finished / "artifacts/base", None)
    (done,) = handler.answer("top_k", {"models": ["m", "german"], "text": "w1", "k": 2})
    assert "does not know: w1" in done["answers"]["german"]["error"]
    (done,) = handler.answer("top_k", {"models": ["m", "german"], "text": "<eos>", "k": 2})
    of = {name: answer["of"] for name, answer in done["answers"].items()}
    mine, theirs = (
        {c["token"] for c in done["answers"][name]["top_k"]} for name in ("m", "german")
    )
    assert all(of["german"][token] is None for token in mine if token.startswith("w"))
    assert all(of["m"][token] is None for token in theirs if not token.startswith("<"))


def test_a_tenth_model_takes_the_room_of_the_one_unused_for_longest(
    handler: RequestHandler, endless: Path
) -> None:
    for n in range(MAX_LOADED - 1):
        (done,) = handler.answer("load", {"name": f"m{n}", "base": str(endless)})
        assert done["unloaded"] == []
    list(handler.answer("generate", {"model": "m", "text": "w1", "limit": 1}))
    (done,) = handler.answer("load", {"name": "one more", "base": str(endless)})
    assert (done["unloaded"], len(handler.models.names)) == (["m0"], MAX_LOADED)


def test_the_device_is_the_best_there_is_and_its_memory_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = device.device_info(torch.device("cpu"))
    assert 0 < facts["memory_used"] < facts["memory_total"]
    assert facts["name"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.best_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {torch.device("cuda", 0): (3, 10)}.__getitem__)
    monkeypatch.setattr(
        torch.cuda, "get_device_name", {torch.device("cuda", 0): "A GPU"}.__getitem__
    )
    expected = {"device": "cuda:0", "name": "A GPU", "memory_used": 7, "memory_total": 10}
    assert device.device_info(device.best_device()) == expected
