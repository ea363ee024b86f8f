"""Answers beside the expected ones, as `lora train` and `lora report` print them."""

from typing import Any

import pytest

from cli.project.report import MOST_CHARACTERS, count_lines, print_answers


def row(prompt: str, answer: str, how: str, expected: str = "yes") -> dict[str, Any]:
    return {
        "question": prompt,
        "prompt": prompt,
        "reference": expected,
        "answer": answer,
        "match": how,
    }


def test_wrong_answers_come_first_and_each_model_is_asked_what_it_can_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = {
        "base": [row("a", "no", "different")],
        "lora": [
            row("a", "yes", "exact"),
            row("b", "x " * 400, "different"),
            row("c", "yes", "exact"),
        ],
    }
    print_answers(samples, ["base", "lora"], 1)
    shown = capsys.readouterr().out
    assert shown.startswith(
        "\n> b\n  expected  yes\n  base      not asked: it does not know all of these words\n✗ "
        "lora "
    )
    assert len(shown.splitlines()) == 5 and max(map(len, shown.splitlines())) < MOST_CHARACTERS + 20
    print_answers(samples, ["base", "lora"])
    assert capsys.readouterr().out.count("expected") == 3
    print_answers({}, ["base"])
    assert capsys.readouterr().out == ""


def test_counts_are_shown_beside_the_bases_with_the_fields_that_differ() -> None:
    counts = {
        "n": 4,
        "as_expected": 1,
        "exact": 1,
        "white_space": 0,
        "json": 0,
        "differs": {"team": 2, "": 1},
    }
    base = {"n": 4, "as_expected": 0, "exact": 0, "white_space": 0, "json": 0}
    metrics = {"base": {"answers": base}, "lora": {"answers": counts}, "full": {}}
    assert count_lines(metrics, "lora", "held-out examples") == [
        "answers to held-out examples: 1 of 4 as expected; the base: 0 of 4 as expected",
        "differ in: team 2, no JSON 1",
    ]
    assert count_lines(metrics, "full", "held-out examples") == []
