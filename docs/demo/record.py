"""Records what the demo's models answer, for `pipeline/inference/replay.py`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from pipeline.inference.handlers import RequestHandler
from pipeline.inference.replay import Exchange, Recorded, Recording
from tui.services.engine_client import ANSWERS

PROMPTS = Path(__file__).with_name("prompts.yaml")
LIMIT = 40  # tokens of an answer
LIKELIEST = 10  # first tokens that a table may show
DIGITS = 4  # of a probability


def record(root: Path, models: Mapping[str, str | None], alike: Mapping[str, str]) -> Path:
    """Ask each model of the project in `root` every prompt; returns the file that was written.

    `models`: folder → the folder of an adapter's base, relative to `root`. `alike`: folder → the
    one of `models` that is the same model.
    """
    engine = RequestHandler()
    facts = {}
    windows = []
    for folder, base in models.items():
        adapter = root / folder if base else None
        fields = {"name": folder, "base": str(root / (base or folder))}
        loaded = _ask(engine, "load", **fields, adapter=adapter and str(adapter))[-1]
        facts[folder] = {key: loaded[key] for key in ("parameters", "chat", "layers", "heads")}
    facts |= {folder: facts[other] for folder, other in alike.items()}
    exchanges = []
    for said, chat in prompts():
        likeliest = _likeliest(engine, [*models], said, chat)
        answers = {}
        for folder in models:
            answers[folder], window = _answer(engine, folder, said, chat, likeliest[folder])
            windows.append(window)
        answers |= {folder: answers[other] for folder, other in alike.items()}
        exchanges.append(Exchange(said, chat, answers))
        print(f"recorded: {' → '.join(said)}", flush=True)
    recording = Recording(facts, max(windows), exchanges)
    path = root / ANSWERS
    path.write_bytes(msgspec.json.encode(recording) + b"\n")
    return path


def prompts() -> Iterator[tuple[list[str], bool]]:
    """(what the user says turn by turn, whether in the chat template), a longer talk at each turn."""
    prompts = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    for talk in prompts["chats"]:
        turns = [talk] if isinstance(talk, str) else talk
        for end in range(1, len(turns) + 1):
            yield turns[:end], True
    for text in prompts["texts"]:
        yield [text], False


def _ask(engine: RequestHandler, do: str, **fields: Any) -> list[dict[str, Any]]:
    return list(engine.answer(do, fields))


def _likeliest(
    engine: RequestHandler, models: list[str], said: Sequence[str], chat: bool
) -> Mapping[str, Any]:
    """Each model's first tokens; of a talk, those of its first turn alone are shown anywhere."""
    fields = {"models": models, "text": said[-1], "k": LIKELIEST, "chat": chat}
    answers: Mapping[str, Any] = _ask(engine, "top_k", **fields)[-1]["answers"]
    return answers


def _answer(
    engine: RequestHandler,
    folder: str,
    said: Sequence[str],
    chat: bool,
    likeliest: Mapping[str, Any],
) -> tuple[Recorded, int]:
    """What a model answers in the end, after its own answers before; and its window."""
    messages: list[dict[str, str]] = []
    events: list[dict[str, Any]] = []
    for text in said:
        if events:
            messages.append({"role": "assistant", "content": _text(events)})
        messages.append({"role": "user", "content": text})
        asked = {"messages": messages} if chat else {"text": text}
        events = _ask(engine, "generate", model=folder, limit=LIMIT, **asked)
    prompt = events[0] if chat else {"tokens": 0, "window": 0}
    tokens = [event for event in events if event["event"] == "token"]
    done = events[-1]
    recorded = Recorded(
        [token["text"] for token in tokens],
        [round(token["probability"], DIGITS) for token in tokens],
        done["reason"],
        prompt["tokens"],
        [(choice["token"], round(choice["probability"], DIGITS)) for choice in likeliest["top_k"]],
        {token: p if p is None else round(p, DIGITS) for token, p in likeliest["of"].items()},
    )
    return recorded, prompt["window"]


def _text(events: Sequence[Mapping[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["event"] == "token").strip()
