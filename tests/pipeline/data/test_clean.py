"""Rows that spoil a training are left out of the new file, and reported by their reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.check import check
from pipeline.data.masking import Encoder
from pipeline.data.quality.clean import Cleaned, Leaks, clean
from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.errors import UserError
from tests.helpers.json_files import write_json, write_jsonl
from tests.helpers.tokenizers import tokenizer_with

GOOD: list[dict[str, Any]] = [
    {"q": "Where is my parcel?", "a": "It left on Monday."},
    {"q": "How do I return a lamp?", "a": "With the label in the box."},
]


def cleaned(
    folder: Path, rows: list[dict[str, Any]], drop: str, **how: Any
) -> tuple[list[str], Cleaned]:
    """The questions that were kept, and the report."""
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    write_jsonl(source, rows)
    done = clean(
        source, out, drop.split(","), columns={"prompt": "q", "completion": "a"}, force=True, **how
    )
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"prompt", "completion"} for row in kept) and done.kept == len(kept)
    return [row["prompt"] for row in kept], done


def test_empty_rows_are_those_without_a_text_where_one_must_be(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        *GOOD,
        {"q": "", "a": "x"},
        {"q": "Hm?", "a": "  "},
        {"q": "Hm?", "a": None},
    ]
    kept, done = cleaned(tmp_path, rows, "empty")
    assert kept == [row["q"] for row in GOOD] and done.dropped == {"empty": 3} and done.rows == 5
    assert [row.row for row in done.examples["empty"]] == [3, 4, 5]
    assert done.examples["empty"][0].why == "prompt is empty. Fill it in, or remove the line."
    with pytest.raises(UserError, match=r"in\.jsonl:3: prompt is empty"):
        cleaned(tmp_path, rows, "duplicates")


def test_what_is_invalid_is_an_error_or_skipped_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*GOOD, {"q": 5, "a": "x"}]
    with pytest.raises(UserError, match=r"in\.jsonl:3: prompt must be a string, got a number"):
        cleaned(tmp_path, rows, "empty")
    _, done = cleaned(tmp_path, rows, "empty", skip_invalid=True)
    assert done.dropped == {"empty": 0, "invalid": 1} and done.kept == 2


def test_a_kept_row_that_cannot_be_written_is_an_error_or_skipped_and_told(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "a"}]
    rows = [
        {
            "chosen": [{"role": "user", "content": "q"}, *answer],
            "rejected": [{"role": "user", "content": asked}, {"role": "assistant", "content": "b"}],
        }
        for asked in ("q", "other")
    ]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"in\.jsonl:2: cannot be written as preference: "):
        clean(source, out, ["empty"])
    done = clean(source, out, ["empty"], skip_invalid=True)
    assert (done.rows, done.kept) == (2, 1)
    assert [group.row for group in done.conversion.skipped] == [2]


def test_texts_without_a_word_are_not_nearly_equal(tmp_path: Path) -> None:
    rows = [{"q": "∀ ∃", "a": "∈"}, {"q": "← →", "a": "↑"}, {"q": "← →", "a": "↑"}]
    kept, done = cleaned(tmp_path, rows, "near-duplicates")
    assert kept == ["∀ ∃", "← →"]
    assert done.examples["near-duplicates"][0].why == "the same as row 2"


def test_a_pair_with_another_rejected_answer_is_another_row(tmp_path: Path) -> None:
    pair = {"prompt": "Where? ", "chosen": "Here.", "rejected": "No."}
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [pair, {**pair, "rejected": "Yes."}, pair])
    assert check([str(source)]).duplicates == 1
    assert clean(source, out, ["duplicates"]).dropped == {"duplicates": 1}
    kept = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["rejected"] for line in kept] == ["No.", "Yes."]


def test_of_equal_and_nearly_equal_rows_the_first_stays(tmp_path: Path) -> None:
    long = (
        "my order of the third of May arrived with a broken shade and without the screws that "
        "hold it to the wall"
    )
    near = [{"q": f"Hello, {long}", "a": "Sorry!"}, {"q": f"hello {long.upper()}.", "a": "Sorry!"}]
    rows: list[dict[str, Any]] = [*GOOD, GOOD[0], *near]
    kept, done = cleaned(tmp_path, rows, "duplicates")
    assert len(kept) == 4 and done.dropped == {"duplicates": 1}
    assert (done.examples["duplicates"][0].row, done.examples["duplicates"][0].why) == (
        3,
        "the same as row 1",
    )
    kept, done = cleaned(tmp_path, rows, "duplicates,near-duplicates")
    assert kept == [*(row["q"] for row in GOOD), near[0]["q"]]
    assert done.dropped == {"duplicates": 1, "near-duplicates": 1}
    assert done.examples["near-duplicates"][0].why == "nearly the same as row 4"
    assert len(cleaned(tmp_path, rows, "near-duplicates")[0]) == 3, (
        "equal rows are nearly equal too"
    )


def test_a_row_is_shown_with_its_prompt_and_its_answer_apart(tmp_path: Path) -> None:
    _, done = cleaned(tmp_path, [*GOOD, GOOD[0]], "duplicates")
    assert done.examples["duplicates"][0].text == "Where is my parcel? It left on Monday."


def test_too_long_counts_tokens_as_training_does(tmp_path: Path) -> None:
    encoder = Encoder(tokenizer_with(tmp_path / "model"))
    rows: list[dict[str, Any]] = [*GOOD, {"q": "Why?", "a": "because " * 100}]
    kept, done = cleaned(tmp_path, rows, "too-long", encoder=encoder, max_length=100)
    assert kept == [row["q"] for row in GOOD] and done.dropped == {"too-long": 1}
    assert done.examples["too-long"][0].why.endswith(" tokens, more than 100")


def test_a_pair_is_too_long_or_invalid_once_whichever_answer_is(tmp_path: Path) -> None:
    answers = [
        (" b", " a"),
        (" b", " a" * 9),
        (" b" * 9, " a"),
        (" b" * 9, " a" * 9),
        (" unknown", " a" * 9),
        (" b", " unknown"),
        (" a", " b"),
    ]
    rows = [{"prompt": "a", "chosen": good, "rejected": bad} for good, bad in answers]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    encoder = Encoder(WordTokenizer.of_words(["a", "b"]))
    done = clean(source, out, ["too-long"], encoder=encoder, max_length=5, skip_invalid=True)
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in kept] == [answers[0], answers[-1]]
    assert done.dropped == {"too-long": 3, "invalid": 2}


def test_what_the_evaluation_asks_is_a_leak_whatever_its_case_and_answer(tmp_path: Path) -> None:
    leaks = Leaks()
    write_json(
        tmp_path / "eval.jsonl",
        {
            "messages": [
                {"role": "user", "content": "WHERE is my parcel"},
                {"role": "assistant", "content": "?"},
            ]
        },
    )
    leaks.add_file(tmp_path / "eval.jsonl", "eval.jsonl", None)
    kept, done = cleaned(tmp_path, GOOD, "leaks", leaks=leaks)
    assert kept == [GOOD[1]["q"]] and done.examples["leaks"][0].why == "asked in eval.jsonl:1"


def test_likely_personal_data_is_counted_in_what_is_kept_and_not_repeated(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        *GOOD,
        {"q": "I am jo@example.org", "a": "Hi"},
        {"q": "I am jo@example.org", "a": "Hi"},
    ]
    _, done = cleaned(tmp_path, rows, "duplicates")
    assert done.personal == {"e-mail address": 1} and done.personal_rows == {"e-mail address": [3]}


def test_a_file_of_which_nothing_is_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row is left \(empty: 1\)"):
        cleaned(tmp_path, [{"q": "", "a": ""}], "empty")
    assert not (tmp_path / "out.jsonl").exists()
