"""Tokens of any model in tables: nothing invisible or misaligned."""

import pytest
from rich.cells import cell_len

from pipeline.files.text import abbreviate_repr, escape_whitespace
from pipeline.inference.talk import Answer
from tui.screens.conversation.turns import MAX_TOKEN, next_tokens
from tui.widgets.cells import pad_or_truncate

TOKENS = [
    " euro",
    "\n",
    "\n\n",
    "<|im_end|>",
    "<0xE2>",
    "世界",
    "",
    "\x00",
    " ",
    "\ufffd",
    "é",
    "a" * 60,
    "🤗",
]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" euro", "␣euro"),
        ("\n", "⏎"),
        ("\t ", "⇥␣"),
        ("<|im_end|>", "<|im_end|>"),
        ("", "∅"),
        ("\x00", "\\x00"),
        ("\u200b", "\\u200b"),
        ("tisch", "tisch"),
    ],
)
def test_no_white_space_goes_unseen(token: str, shown: str) -> None:
    assert escape_whitespace(token) == shown


def test_the_table_of_next_tokens_has_any_token_of_any_model_once() -> None:
    """Of two models that share half of their tokens, as those of different tokenizers do."""
    one = Answer(
        "one",
        "one",
        top_k=[(token, 0.05) for token in TOKENS[:8]],
        probabilities=dict.fromkeys(TOKENS, 0.05),
    )
    other = Answer(
        "other",
        "other",
        top_k=[(token, 0.05) for token in TOKENS[5:]],
        probabilities={**dict.fromkeys(TOKENS), "é": 0.5},
    )
    tokens, (name, *columns) = next_tokens([one, other])
    assert sorted(tokens) == sorted(TOKENS)
    names = [str(name.cell(token)) for token in tokens]
    assert all(text and cell_len(text) <= 2 * MAX_TOKEN and text.isprintable() for text in names)
    assert [column.title for column in columns] == ["one", "other"]
    cells = [str(columns[1].cell(token)) for token in tokens]
    assert cells.count("unknown") == len(TOKENS) - 1
    assert " 50.0 +45.0 ████" in cells[tokens.index("é")]


@pytest.mark.parametrize("text", ["", "ab", "abcdef", "世界世界", "a世界世"])
def test_a_fitted_text_has_its_width(text: str) -> None:
    for width in (1, 3, 4, 5, 20):
        assert cell_len(pad_or_truncate(text, width)) == width


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "kind"), [(10**5_000, "int"), (Nameless(), "Nameless")], ids=["int", "code"]
)
def test_what_has_no_text_of_its_own_is_shown_by_its_type(value: object, kind: str) -> None:
    assert abbreviate_repr(value) == f"a value of type {kind}"
