"""Recorded answers are replayed as the models' own answers would come; what was not recorded is
refused, with what was.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.files.worker import Worker, python_module
from pipeline.inference.handlers import KINDS
from pipeline.inference.replay import KINDS as REPLAYED
from pipeline.inference.replay import RATE

PATIENCE = 30.0
BASE, ADAPTER = "artifacts/expanded", "artifacts/lora_adapter"


def recorded(*pieces: str) -> dict[str, Any]:
    """An answer whose first piece has half of the probability."""
    return {
        "pieces": pieces,
        "probabilities": [0.5] * len(pieces),
        "reason": "end",
        "prompt_tokens": 9,
        "top_k": [[pieces[0], 0.5], [" other", 0.25]],
        "of": {pieces[0]: 0.5, " other": 0.25, " rare": 0.0},
    }


def exchange(*said: str, chat: bool = True, **answers: Any) -> dict[str, Any]:
    return {
        "said": said,
        "chat": chat,
        "answers": {BASE: answers["base"], ADAPTER: answers["lora"]},
    }


RECORDING = {
    "models": {
        BASE: {"parameters": 100, "chat": True, "layers": 2, "heads": 4},
        ADAPTER: {"parameters": 110, "chat": True, "layers": 2, "heads": 4},
    },
    "window": 64,
    "exchanges": [
        exchange("Hi", base=recorded("Hello", ", user"), lora=recorded(" hey")),
        exchange("Hi", "Why?", base=recorded("Because"), lora=recorded(*[" idk"] * 40)),
        exchange("One is", chat=False, base=recorded(" one"), lora=recorded(" many")),
    ],
}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    (tmp_path / "answers.json").write_text(json.dumps(RECORDING), encoding="utf-8")
    return tmp_path


@pytest.fixture
def process(demo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """The replaying process, with both models loaded under their paths."""
    monkeypatch.chdir(demo)
    command = python_module("pipeline.inference.replay", "answers.json")
    worker = Worker(command, sys.stderr.fileno())
    for folder, adapter in ((BASE, None), (ADAPTER, ADAPTER)):
        facts = ask(worker, "load", name=str(demo / folder), base=BASE, adapter=adapter)[-1]
        assert facts["parameters"] == (110 if adapter else 100)
        assert facts["unloaded"] == []
    yield worker
    worker.kill()


def ask(process: Worker, do: str, **fields: object) -> list[dict[str, Any]]:
    process.send(do, **fields)
    answers = [process.read(PATIENCE)[0]]
    while answers[-1]["event"] != "done":
        answers.append(process.read(PATIENCE)[0])
    return answers


def generated(process: Worker, model: Path, **fields: object) -> str:
    events = ask(process, "generate", model=str(model), **fields)
    return "".join(event["text"] for event in events if event["event"] == "token")


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def test_a_model_answers_a_conversation_by_what_the_user_said_whatever_it_answered(
    process: Worker, demo: Path
) -> None:
    assert generated(process, demo / BASE, messages=turns("Hi")) == "Hello, user"
    talk = turns("Hi", "anything", "Why? ")
    assert generated(process, demo / BASE, messages=talk) == "Because"
    assert generated(process, demo / ADAPTER, messages=talk).startswith(" idk idk")
    assert generated(process, demo / ADAPTER, text="One is") == " many"
    assert generated(process, demo / ADAPTER, text="Hi", chat=True) == " hey"


def test_events_are_those_of_the_inference_process_at_a_readers_pace(
    process: Worker, demo: Path
) -> None:
    start = time.monotonic()
    talk = turns("Hi", "hey", "Why?")
    prompt, token, *_, done = ask(process, "generate", model=str(demo / BASE), messages=talk)
    assert time.monotonic() - start >= 1 / RATE
    assert (prompt["tokens"], prompt["window"], prompt["cut_messages"]) == (9, 64, 0)
    assert token["probability"] == 0.5
    assert (done["reason"], done["tokens"], done["tokens_per_second"]) == ("end", 1, None)

    short = ask(process, "generate", model=str(demo / BASE), messages=turns("Hi"), limit=1)[-1]
    assert (short["reason"], short["tokens"]) == ("length", 1)


def test_a_table_has_the_tokens_that_any_of_the_models_lists(process: Worker, demo: Path) -> None:
    names = [str(demo / BASE), str(demo / ADAPTER)]
    fields = {"text": "One is", "k": 1, "models": names}
    answers = ask(process, "top_k", **fields)[-1]["answers"]
    assert answers[names[0]]["top_k"] == [{"token": " one", "probability": 0.5}]
    assert answers[names[0]]["of"] == {" one": 0.5, " many": None}
    strong = ask(process, "top_k", **fields, strength={names[1]: 1.5})[-1]["answers"]
    assert "at strength 1" in strong[names[1]]["error"] and "top_k" in strong[names[0]]


def test_status_says_that_answers_are_replayed(process: Worker, demo: Path) -> None:
    status = ask(process, "status")[-1]
    assert status["device"] == "replayed" and "no weights" in status["name"]
    assert status["pid"] == process.process.pid != os.getpid()
    assert status["loaded"] == [str(demo / BASE), str(demo / ADAPTER)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": turns("Bye")}, 'It knows "Hi". README.md has them all'),
        ({"messages": [{"role": "system", "content": "Be kind"}, *turns("Hi")]}, "none to this"),
        ({"text": "Two is"}, 'It knows "One is"'),
        ({"messages": turns("Hi"), "temperature": 1.0}, "Set the temperature to 0"),
        ({"messages": turns("Hi"), "strength": 0.5}, "Set it to 1"),
    ],
    ids=["unknown", "system prompt", "text", "temperature", "strength"],
)
def test_what_was_not_recorded_is_refused(
    process: Worker, demo: Path, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match="This demo has no weights") as refused:
        generated(process, demo / BASE, **fields)
    assert reason in str(refused.value)


def test_what_needs_weights_is_refused_and_a_model_without_answers_too(
    process: Worker, demo: Path
) -> None:
    for do in KINDS.keys() - REPLAYED.keys():
        with pytest.raises(UserError, match=f"no weights, which '{do}' needs"):
            ask(process, do, model=str(demo / BASE))
    with pytest.raises(UserError, match="no recorded answers of artifacts/other"):
        ask(process, "load", name="other", base="artifacts/other")


def test_an_answer_that_is_cancelled_ends_at_once(process: Worker, demo: Path) -> None:
    talk = turns("Hi", "hey", "Why?")
    process.send("generate", model=str(demo / ADAPTER), messages=talk)
    assert process.read(PATIENCE)[0]["event"] == "prompt"
    process.send("cancel", target=3)  # two loads came before
    events = {process.read(PATIENCE)[0]["event"] for _ in range(2)}
    assert events == {"done", "cancelled"}
