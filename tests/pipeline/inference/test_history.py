"""A conversation as a prompt: what is cut when it no longer fits, and what a request with messages
is told.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.files.text import join_texts
from pipeline.inference import engine
from pipeline.inference.chat import Message, fit_history
from pipeline.inference.engine import LoadedModel
from pipeline.inference.handlers import RequestHandler
from tests.helpers.families import FAMILIES, new_project

WINDOW = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama with a chat template and a window of 64 tokens."""
    return new_project(tmp_path_factory.mktemp("llama"), FAMILIES["llama"]) / "base"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return engine.load(folder)


def conversation(turns: int, system: str = "") -> list[Message]:
    """A question and an answer for each turn; the last has no answer."""
    messages = [
        {"role": role, "content": f"{n} is"} for n in range(turns) for role in ("user", "assistant")
    ]
    return [{"role": "system", "content": system}] * bool(system) + messages[:-1]


def rendered_ids(folder: Path, messages: list[Message]) -> tuple[int, ...]:
    """By transformers itself."""
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(theirs.encode(text, add_special_tokens=False))


def test_a_history_that_fits_is_the_rendered_template(folder: Path, loaded: LoadedModel) -> None:
    messages = conversation(2, system="2")
    history = fit_history(loaded, messages, limit=8)
    assert history.ids == rendered_ids(folder, messages)
    assert (history.cut_messages, history.cut_tokens, history.opens_thought) == (0, 0, False)


@pytest.mark.parametrize("system", ["", "2"], ids=["no system", "system"])
@pytest.mark.parametrize("limit", [4, 512], ids=["short answer", "long answer"])
def test_the_oldest_turns_are_cut_and_not_one_more(
    folder: Path, loaded: LoadedModel, system: str, limit: int
) -> None:
    messages, head = conversation(12, system), bool(system)
    room = WINDOW - min(limit, WINDOW // 4)
    history = fit_history(loaded, messages, limit)
    cut = history.cut_messages
    kept = messages[:head] + messages[head + cut :]
    assert history.ids == rendered_ids(folder, kept)
    assert kept[head]["role"] == "user"
    assert (
        len(history.ids)
        <= room
        < len(rendered_ids(folder, messages[:head] + messages[head + cut - 2 :]))
    )
    assert history.cut_tokens == len(rendered_ids(folder, messages)) - len(history.ids)


def test_the_last_message_is_read_even_if_it_leaves_less_than_a_quarter(
    loaded: LoadedModel,
) -> None:
    last = {"role": "user", "content": "x" * 50}
    history = fit_history(loaded, [*conversation(3)[:-1], last], limit=512)
    assert history.cut_messages == 4
    assert WINDOW * 3 // 4 < len(history.ids) <= WINDOW


def test_a_last_message_that_is_too_long_alone_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"The prompt has \d+ tokens; .* takes 64"):
        fit_history(loaded, [{"role": "user", "content": "x" * 100}], limit=8)


def test_a_template_that_begins_a_thought_says_so(folder: Path, tmp_path: Path) -> None:
    thinks = shutil.copytree(folder, tmp_path / "thinks")
    template = thinks / "chat_template.jinja"
    template.write_text(
        template.read_text(encoding="utf-8") + "{{ '<think>\\n' }}", encoding="utf-8"
    )
    assert fit_history(engine.load(thinks), conversation(1), limit=8).opens_thought


def test_a_model_without_template_goes_on_with_the_text_and_loses_its_beginning(
    endless: Path,
) -> None:
    loaded = engine.load(endless)
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": " w3"}]
    messages.append({"role": "user", "content": "w4"})
    assert fit_history(loaded, messages, 5).ids == loaded.tokenizer.encode("w1 w2 w3 w4")
    window = loaded.model.max_length
    history = fit_history(loaded, [{"role": "user", "content": "w1 " * window + "w2"}], limit=10)
    assert history.ids == loaded.tokenizer.encode("w1 " * (window - 11) + "w2")
    assert history.cut_tokens == 11


def test_contents_are_joined_by_one_space_where_there_is_none() -> None:
    assert join_texts(["a", "", "b", " c", "d\n", "e"]) == "a b c d\ne"
    assert join_texts(["a ", "b"]) == join_texts(["a", " b"]) == "a b"


def test_a_request_with_messages_tells_the_prompt_before_the_tokens(
    folder: Path, loaded: LoadedModel
) -> None:
    handler = RequestHandler()
    handler.models.load("m", folder, None)
    messages = conversation(12)
    fields = {"model": "m", "messages": messages, "limit": 4}
    prompt, *_, done = handler.answer("generate", fields)
    history = fit_history(loaded, messages, 4)
    assert prompt == {
        "event": "prompt",
        "tokens": len(history.ids),
        "window": WINDOW,
        "cut_messages": history.cut_messages,
        "cut_tokens": history.cut_tokens,
        "opens_thought": False,
    }
    assert done["event"] == "done"
    assert done["tokens_per_second"] is None or done["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages: expected `array` of length >= 1"),
        ("hello", r"messages: expected `array \| null`, got `str`"),
        (
            [{"role": "tool", "content": "x"}],
            r"messages\[0\].role: invalid enum value 'tool'",
        ),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": "\ud800"}], r"messages must be valid Unicode"),
        (
            [{"role": "user", "content": "<|end|>"}],
            r"messages\[0\] contains <\|end\|>, a special token",
        ),
    ],
    ids=["empty", "text", "role", "content", "surrogate", "special token"],
)
def test_messages_that_are_none_are_refused(folder: Path, messages: Any, message: str) -> None:
    handler = RequestHandler()
    handler.models.load("m", folder, None)
    with pytest.raises(UserError, match=message):
        list(handler.answer("generate", {"model": "m", "messages": messages}))
