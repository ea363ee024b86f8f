"""What each kind of task counts as right, and what it refuses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.evaluation.kinds import KINDS, TaskExample, TaskOptions, plain, regex
from pipeline.files import patterns
from tests.helpers.errors import user_error


def scored(kind: str, answer: Any, row: Mapping[str, Any], **options: Any) -> Mapping[str, float]:
    KINDS[kind].check(row, "t.yaml: t, example 1")
    score = KINDS[kind].scorer(TaskOptions(options, "t.yaml: t", Path(), {}))
    return score(answer, TaskExample("", row, "t.yaml: t, example 1"))


def test_the_kinds_are_the_files() -> None:
    assert set(KINDS) == {"exact_match", "contains", "regex", "multiple_choice", "python"}


@pytest.mark.parametrize(
    ("answer", "exact", "within"),
    [
        ("Sofia", 1, 1),
        (" Sofia\n", 1, 1),
        ("sofia", 0, 0),
        ("It is Sofia.", 0, 1),
        ("Sof", 0, 0),
        ("", 0, 0),
    ],
)
def test_exact_match_is_all_of_the_answer_and_contains_a_part(
    answer: str, exact: float, within: float
) -> None:
    assert scored("exact_match", answer, {"answer": "Sofia"}) == {"score": exact}
    assert scored("contains", answer, {"answer": "Sofia"}) == {"score": within}


def test_one_of_several_answers_is_enough_and_case_can_be_ignored() -> None:
    for kind in ("exact_match", "contains"):
        assert scored(kind, "PLOVDIV", {"answer": ["Sofia", "Plovdiv"]}) == {"score": 0}
        assert scored(kind, "PLOVDIV", {"answer": ["Sofia", "Plovdiv"]}, ignore_case=True) == {
            "score": 1
        }
    assert scored("exact_match", "Cafe\u0301  au lait", {"answer": "Café au lait"}) == {
        "score": 1
    }, "NFC, white space"


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: plain(text) != ""
)


@given(WORDS, WORDS, WORDS)
def test_an_answer_contains_what_stands_in_it(word: str, before: str, behind: str) -> None:
    assert scored("contains", f"{before} {word} {behind}", {"answer": word})["score"] == 1


def test_a_pattern_is_searched_in_the_answer() -> None:
    assert scored("regex", "It costs 12 euros.", {"pattern": r"\b\d+ euros?\b"}) == {"score": 1}
    assert scored("regex", "It costs euros.", {"pattern": r"\b\d+ euros?\b"}) == {"score": 0}
    assert scored("regex", "two\nlines", {"pattern": r"(?m)^lines$"}) == {"score": 1}


def test_a_pattern_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (patterns, regex):
        monkeypatch.setattr(module, "BUDGET", 0.05)
    with pytest.raises(
        UserError, match=r"^t.yaml: t, example 1: matching .* an answer must take at most 0"
    ) as error:
        scored("regex", "a" * 60, {"pattern": r"(\w|.|_)*\d"})
    assert "module" not in str(error.value)


@given(
    st.lists(st.floats(-50, 0), min_size=4, max_size=4),
    st.lists(st.text("abc", min_size=1, max_size=9), min_size=4, max_size=4, unique=True),
    st.integers(0, 3),
    st.booleans(),
)
def test_multiple_choice_is_the_largest_log_likelihood_alone_and_by_length(
    values: list[float], choices: list[str], right: int, normalized: bool
) -> None:
    # as lm-evaluation-harness: np.argmax of the log-likelihoods, and of these by the number of
    # characters
    acc = float(max(range(4), key=lambda n: (values[n], -n)) == right)
    acc_norm = float(max(range(4), key=lambda n: (values[n] / len(choices[n]), -n)) == right)
    expected = (
        {"score": acc_norm, "acc": acc} if normalized else {"score": acc, "acc_norm": acc_norm}
    )
    for answer in (right, choices[right]):
        row = {"choices": choices, "answer": answer}
        assert scored("multiple_choice", values, row, normalized=normalized) == expected


def test_a_choice_that_a_model_cannot_write_is_never_the_right_one() -> None:
    row = {"choices": ["yen", "euro"], "answer": "yen"}
    assert scored("multiple_choice", [None, -3.0], row)["score"] == 0
    assert scored("multiple_choice", [None, None], row)["score"] == 0
    assert scored("multiple_choice", [-100.0, None], row)["score"] == 1


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("exact_match", {"prompt": "p"}, "answer must be a string"),
        ("exact_match", {"answer": True}, "answer must be a string"),
        ("contains", {"answer": []}, "answer must be a list of texts"),
        ("contains", {"answer": [" "]}, "answer is empty"),
        ("regex", {"answer": "a"}, "pattern must be a string"),
        (
            "regex",
            {"pattern": "("},
            "'(' is not a regular expression: missing ), unterminated subpattern",
        ),
        (
            "multiple_choice",
            {"choices": ["a"], "answer": "a"},
            "choices must be two or more different texts",
        ),
        (
            "multiple_choice",
            {"choices": ["a", "a"], "answer": 0},
            "choices must be two or more different texts",
        ),
        (
            "multiple_choice",
            {"choices": ["a", "b"], "answer": "c"},
            "answer must be one of the choices, or its number",
        ),
        (
            "multiple_choice",
            {"choices": ["a", "b"], "answer": 2},
            "answer must be one of the choices, or its number",
        ),
        (
            "multiple_choice",
            {"choices": ["a", "b"]},
            "answer must be one of the choices, or its number",
        ),
        ("multiple_choice", {"choices": "a", "answer": "a"}, "choices must be a list of texts"),
    ],
)
def test_an_example_that_cannot_be_scored_is_refused(
    kind: str, row: dict[str, Any], said: str
) -> None:
    reason = user_error(scored, kind, "", row)
    assert reason.startswith(f"t.yaml: t, example 1: {said}")


def python(folder: Path, code: str, answer: str = "four") -> float:
    (folder / "mine.py").write_text(code, encoding="utf-8")
    files = {(folder / "mine.py").resolve(): "data/mine.py"}
    score = KINDS["python"].scorer(
        TaskOptions({"scorer": "mine.py"}, "t.yaml: sums", folder, files)
    )
    return score(
        answer,
        TaskExample("2 + 2 =", {"answer": "four", "weights": [1]}, "t.yaml: sums, example 1"),
    )["score"]


def test_a_function_of_the_users_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (
        "def score(answer, example):\n    print('seen')\n    return len(answer) / 8 + (answer == "
        "example['answer']) / 2"
    )
    assert python(tmp_path, lines) == 1
    assert capsys.readouterr().out == "", "the command's result alone goes to stdout"
    assert python(tmp_path, lines, "for") == 3 / 8
    assert (
        python(
            tmp_path,
            "from numpy import float32\ndef score(answer, example):\n    return float32(0.5)",
        )
        == 0.5
    )
    assert python(tmp_path, "def score(answer, example):\n    return answer == 'four'") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"], (
        "no compiled file beside the user's data"
    )


def test_what_it_changes_in_an_example_is_gone_with_the_next(tmp_path: Path) -> None:
    code = (
        "def score(answer, example):\n    example['weights'].append(0)\n    return 1 / "
        "(len(example['weights']) - 1)"
    )
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    files = {(tmp_path / "mine.py").resolve(): "mine.py"}
    score = KINDS["python"].scorer(TaskOptions({"scorer": "mine.py"}, "t", tmp_path, files))
    example = TaskExample("", {"weights": [1]}, "t, example 1")
    assert [score("", example)["score"] for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def score(answer, example)\n    return 1", "data/mine.py:1: SyntaxError: "),
        (
            "\nimport nowhere_at_all",
            "data/mine.py:2: ModuleNotFoundError: No module named 'nowhere_at_all' (at",
        ),
        (
            "def scores(answer, example):\n    return 1",
            "data/mine.py has no function score(answer, example).",
        ),
        (
            "def help(a):\n    return a['key']\n\ndef score(answer, example):\n    return "
            "help(example)",
            "data/mine.py:2: KeyError: 'key' (at t.yaml: sums, example 1). Correct the scorer.",
        ),
        (
            "def score(answer):\n    return 1",
            "data/mine.py: TypeError: score() takes 1 positional argument",
        ),
        (
            "def score(answer, example):\n    raise SystemExit(3)",
            "data/mine.py:2: SystemExit: 3 (at",
        ),
        ("import sys\nsys.exit()", "data/mine.py:2: SystemExit (at"),
        (
            "def score(answer, example):\n    return 1 + score(answer, example)",
            "data/mine.py:2: RecursionError: ",
        ),
        *(
            (
                f"def score(answer, example):\n    return {value}",
                "data/mine.py: score must return a number from 0 to 1, got",
            )
            for value in (
                *("2", "-0.1", "float('nan')", "float('inf')", "'1'", "None", "[1]", "1j"),
                "10**400",  # more than a float can hold
            )
        ),
    ],
)
def test_what_is_wrong_with_a_scorer_is_said_with_its_line(
    tmp_path: Path, code: str, said: str
) -> None:
    reason = user_error(python, tmp_path, code)
    assert reason.startswith(said)


def test_code_that_the_params_do_not_name_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"scorer theirs.py is not in evaluate.tasks. It is code that would run here",
    ):
        KINDS["python"].scorer(TaskOptions({"scorer": "theirs.py"}, "t.yaml: t", tmp_path, {}))
