"""Tokens of any model in tables and in the attention view: nothing invisible or misaligned."""

import random
import time

import pytest
from rich.cells import cell_len

from pipeline.files.text import abbreviate_repr, escape_whitespace
from tui.screens.models.answers import CELL, format_answer, table
from tui.screens.models.attention import HEAVIEST, bars, matrix, window
from tui.screens.models.conversation import Answer, Exchange
from tui.services.loaded_models import Sampling
from tui.widgets.text import pad_or_truncate

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


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_columns_of_any_tokens_stand_below_one_another(width: int) -> None:
    """Of two models that share half of their tokens, as those of different tokenizers do."""
    one = Answer(
        "one", top_k=[(token, 0.05) for token in TOKENS[:8]], of=dict.fromkeys(TOKENS, 0.05)
    )
    other = Answer(
        "other",
        top_k=[(token, 0.05) for token in TOKENS[5:]],
        of={**dict.fromkeys(TOKENS), "é": 0.5},
    )
    lines = str(table([one, other], width, {"success": "green", "error": "red"})).splitlines()
    assert len(lines) == 1 + len(TOKENS)
    starts = {cell_len(line[: line.index("5.0")]) for line in lines[1:]}
    assert len(starts) == 1
    assert sum("unknown" in line for line in lines) == len(TOKENS) - 1
    assert all(cell_len(line) <= width for line in lines)
    assert width >= 2 * CELL


@pytest.mark.parametrize("text", ["", "ab", "abcdef", "世界世界", "a世界世"])
def test_a_fitted_text_has_its_width(text: str) -> None:
    for width in (1, 3, 4, 5, 20):
        assert cell_len(pad_or_truncate(text, width)) == width


@pytest.mark.parametrize("count", [1, 3, 40, 200, 512])
@pytest.mark.parametrize("width", [40, 76, 156])
def test_attention_of_many_tokens_fits_any_width(count: int, width: int) -> None:
    tokens = [escape_whitespace(TOKENS[i % len(TOKENS)]) for i in range(count)]
    noise = random.Random(0)
    weights = [
        [noise.random() for _ in range(row + 1)] + [0.0] * (count - row - 1) for row in range(count)
    ]
    weights = [[weight / sum(row) for weight in row] for row in weights]
    start = time.process_time()
    for token in {0, count // 2, count - 1}:
        first, stop = window(tokens, token, width)
        assert first <= token < stop
        rows = matrix(tokens, weights, token, width)
        assert len(rows) == 1 + stop - first and all(row.cell_len <= width for row in rows)
        assert rows[1 + token - first].plain.startswith("▸")
        lines = bars(tokens, weights, weights, token)
        assert len(lines) <= HEAVIEST + 2 and ("others" in str(lines[-1]) or token < HEAVIEST)
        if count == 512:
            assert f"tokens {first + 1} to {stop} of 512" in rows[0].plain
    assert time.process_time() - start < 3 * 0.5


def test_an_answer_follows_its_prompt_with_the_space_that_it_has() -> None:
    for text, whole in ((" euro.", "is the euro."), ("s", "is thes"), ("\n1", "is the\n1")):
        exchange = Exchange("is the", Sampling(), [answer := Answer("m", text=text)])
        assert exchange.answers_text() == whole
        assert str(format_answer(exchange, [answer], 1.0)) == f"m  {whole}"


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "kind"), [(10**5_000, "int"), (Nameless(), "Nameless")], ids=["int", "code"]
)
def test_what_has_no_text_of_its_own_is_shown_by_its_type(value: object, kind: str) -> None:
    assert abbreviate_repr(value) == f"a value of type {kind}"
