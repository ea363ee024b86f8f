"""A row as its turns: the text that the model reads, and in it what the encoder trains on."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.containers import Row
from pipeline.data.examples import Example
from pipeline.data.formats import example_of
from pipeline.data.masking import Encoder
from pipeline.data.tokenizers.word import Tokenizer, WordTokenizer
from pipeline.data.turns import View, view
from tests.helpers.tokenizers import MARKED, SMOLLM2, THINKS, tokenizer_with

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Sofia?"},
    {"role": "assistant", "content": "In the west."},
    {"role": "user", "content": "And Varna?"},
    {"role": "assistant", "content": "By the sea äöü."},
]
ROWS: dict[str, Any] = {
    "text": {"text": "The euro. The lev."},
    "prompt": {"prompt": "The currency is", "completion": " the euro"},
    "messages": {"messages": TURNS},
    "untrained": {"messages": [*TURNS[:2], {**TURNS[2], "train": False}, *TURNS[3:]]},
    "chat prompt": {"prompt": TURNS[:4], "completion": TURNS[4:]},
}


def example(record: Any) -> Example:
    return example_of(Row(1, record), "f.jsonl")


def texts(shown: View, kind: str = "") -> str:
    return "".join(text for turn in shown.turns for each, text in turn.parts if kind in ("", each))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("template", [SMOLLM2, MARKED, THINKS], ids=["smollm2", "marked", "thinks"])
def test_the_mask_is_the_encoders(tmp_path: Path, name: str, template: str) -> None:
    tokenizer: Tokenizer = tokenizer_with(tmp_path, template)
    encoded = Encoder(tokenizer)(example(ROWS[name]))
    shown = view(example(ROWS[name]), tokenizer)
    trained = [id_ for id_, on in zip(encoded.ids[1:], encoded.trained[1:], strict=True) if on]
    assert (shown.tokens, shown.trained, shown.cut) == (len(encoded.ids), encoded.labels, 0)
    marked = "".join(c if c.isascii() else "".join(f"<0x{b:02X}>" for b in c.encode()) for c in texts(shown, "trained"))
    assert marked.replace(" ", "") == "".join(map(tokenizer.word, trained)).replace(" ", "")
    if name in ("messages", "untrained", "chat prompt"):
        assert texts(shown).startswith(str(tokenizer.render(example(ROWS[name]).messages, False)))
        assert [turn.role for turn in shown.turns] == [turn["role"] for turn in TURNS]
        for turn, message in zip(shown.turns, TURNS, strict=True):
            assert message["content"] in "".join(text for _, text in turn.parts), "each turn holds its own text"


@pytest.mark.parametrize("name", ROWS)
def test_the_cut_is_where_the_encoder_cuts(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    whole = view(example(ROWS[name]), tokenizer)
    assert whole.tokens is not None
    for most in (1, whole.tokens // 2, whole.tokens - 1, whole.tokens, whole.tokens + 1):
        shown, encoded = view(example(ROWS[name]), tokenizer, most), Encoder(tokenizer, most)(example(ROWS[name]))
        assert (shown.cut, shown.trained) == (encoded.cut, encoded.labels)
        assert texts(shown) == texts(whole), "the text stays, marked as cut"
        assert bool(texts(shown, "cut")) == bool(encoded.cut)
        kinds = [kind == "cut" for turn in shown.turns for kind, _ in turn.parts]
        assert kinds == sorted(kinds), "nothing behind the cut is read"


def test_without_a_tokenizer_the_roles_say_what_is_trained_on() -> None:
    shown = view(example(ROWS["untrained"]))
    assert [(turn.role, turn.parts[0][0]) for turn in shown.turns] == [
        ("system", "read"),
        ("user", "read"),
        ("assistant", "read"),
        ("user", "read"),
        ("assistant", "trained"),
    ]
    assert shown.tokens is None and texts(shown, "trained") == "By the sea äöü."
    assert texts(view(example(ROWS["prompt"])), "trained") == " the euro"


def test_words_keep_their_case_and_the_end_token_is_shown() -> None:
    tokenizer = WordTokenizer.of_words(["der", "wind", "weht"])
    shown = view(example({"prompt": "Der  WIND", "completion": " weht"}), tokenizer, 3)
    assert [turn.parts for turn in shown.turns] == [(("read", "Der  WIND"),), (("trained", " weht"), ("cut", "<eos>"))]


def test_the_rejected_answer_of_a_pair_and_a_prompt_alone_are_shown(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    pair = view(example({"prompt": "Where?", "chosen": " Here.", "rejected": " There."}), tokenizer)
    assert [turn.role for turn in pair.turns] == ["prompt", "completion", "rejected"]
    assert "There" not in texts(pair, "trained")
    alone = view(example({"prompt": "Where is"}), tokenizer)
    assert [turn.role for turn in alone.turns] == ["prompt"] and texts(alone, "trained") == ""
