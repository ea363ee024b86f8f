"""What `lora data check` reports about a file, against training's own reading and plain
counting.
"""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.check import NEAR, STEP, DataReport, _histogram, check, suggest_max_length
from pipeline.data.examples import in_evaluation
from pipeline.data.formats import iter_examples
from pipeline.data.masking import Encoder, encode
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.data.windows import Corpus
from pipeline.errors import UserError
from pipeline.files.problems import KEPT, MAX_GROUPS
from tests.helpers.tokenizers import SMOLLM2, tokenizer_with

Rows = list[Any]
# A template that writes tool calls too: one that does not is refused.
CALLS = SMOLLM2.replace(
    "message['content']",
    "(message['content'] or '') + (message['tool_calls'] | tojson if message['tool_calls'] else "
    "'')",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SubwordTokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("model"), CALLS)


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows),
        encoding="utf-8",
    )
    return path


def turns(*contents: str, roles: str = "ua") -> dict[str, Any]:
    """A conversation; `roles` by their first letters, again and again."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {
        "messages": [
            {"role": names[roles[n % len(roles)]], "content": c} for n, c in enumerate(contents)
        ]
    }


def calling(arguments: Any, tools: list[str] | None = None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Which currency?"},
        {"role": "assistant", "content": "Hello", "tool_calls": [call]},
        {"role": "tool", "content": "euro"},
        {"role": "assistant", "content": "The euro."},
    ]
    return {
        "messages": messages,
        "tools": [{"type": "function", "function": {"name": name}} for name in tools or []],
    }


def found(report: DataReport) -> list[tuple[int | None, str]]:
    return [(problem.row, problem.level) for problem in report.problems]


GOOD = turns("Which currency has Bulgaria?", "The euro.")
ERRORS: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"messages": [', "not JSON"),
    "no object": ([1], "must be a JSON object, such as"),
    "an unknown key": ({"mesages": []}, "unknown key 'mesages'. Did you mean 'messages'?"),
    "an empty answer": (turns("Hello", ""), "messages[1]: content is empty"),
    "an answer first": (turns("Hello", roles="a"), 'must not start with an "assistant" turn'),
    "an unknown role": (
        {"messages": [{"role": "bot", "content": "x"}]},
        "messages[0]: role must be one of",
    ),
    "no answer": (turns("Hello", roles="u"), "nothing to train on"),
    "another format": ({"instruction": "a", "output": "b"}, "Put them into two files"),
    "a special token in a turn": (turns("<|im_end|>", "Hello"), "messages[0] contains <|im_end|>"),
    "arguments that are no JSON": (
        calling("euro"),
        "turn 2: the arguments of 'look_up' are no JSON object",
    ),
    "arguments that are a list": (
        calling([1]),
        "turn 2: the arguments of 'look_up' are no JSON object",
    ),
    "a call without a name": (
        {
            "messages": [
                GOOD["messages"][0],
                {"role": "assistant", "tool_calls": [{"function": {}}]},
            ]
        },
        "messages[1]: tool_calls[0] must be",
    ),
    "too many tokens": (turns("Hello", "euro " * 300), "more than the model's 256 positions"),
}


@pytest.mark.parametrize("fault", ERRORS)
def test_an_error_is_reported_with_its_row_and_the_rows_behind_it_are_read(
    tmp_path: Path, tokenizer: SubwordTokenizer, fault: str
) -> None:
    row, message = ERRORS[fault]
    file = jsonl(tmp_path / "d.jsonl", [GOOD, row, turns("And Japan?", "The yen.")])
    report = check([file], tokenizer, positions=256)
    assert not report.ok and report.rows == 3
    (problem,) = (each for each in report.problems if each.level == "error")
    assert problem.row == 2 and problem.file == str(file) and message in problem.problem
    assert not problem.problem.startswith(str(file))
    good = check([jsonl(tmp_path / "d.jsonl", [GOOD, turns("And Japan?", "The yen.")])], tokenizer)
    if fault not in ("too many tokens", "arguments that are no JSON", "arguments that are a list"):
        assert (report.tokens, report.trained_tokens) == (good.tokens, good.trained_tokens)


WARNINGS: dict[str, tuple[Any, str]] = {
    "a duplicate": (GOOD, "the same as row 1."),
    "two questions in a row": (
        turns("Hello", "Hello", "Hello!", roles="uua"),
        "turn 2: two user turns in a row.",
    ),
    "two answers in a row": (
        turns("Hello", "a", "b", roles="uaa"),
        "turn 3: two assistant turns in a row.",
    ),
    "a system turn behind": (
        turns("Hello", "a", "b", "c", roles="uasa"),
        "turn 3: a system turn that is not the first",
    ),
    "no answer at the end": (
        turns("Hello", "a", "b", roles="ua"),
        "ends with a user turn, which is not trained on.",
    ),
    "a tool without a call": (
        turns("Hello", "a", "b", roles="uta"),
        "turn 2: a tool turn without a tool call",
    ),
    "a call of another tool": (
        calling({}, ["answer"]),
        "turn 2: a call of 'look_up', which is not in tools.",
    ),
    "broken characters": (turns("Hell\ufffd", "a"), "\ufffd stands for bytes that were no text"),
    "an extra key": ({**turns("Hello", "a"), "source": "x"}, "not used: source (1 row)"),
    "a blank line": ("", "1 blank line skipped"),
}


@pytest.mark.parametrize("fault", WARNINGS)
def test_what_trains_but_should_not_be_there_is_a_warning(
    tmp_path: Path, tokenizer: SubwordTokenizer, fault: str
) -> None:
    row, message = WARNINGS[fault]
    report = check(
        [jsonl(tmp_path / "d.jsonl", [GOOD, row, turns("And Japan?", "The yen.")])], tokenizer
    )
    (problem,) = report.problems
    assert report.ok and problem.level == "warning" and message in problem.problem
    assert problem.row == (None if fault in ("an extra key", "a blank line") else 2)
    assert list(iter_examples(tmp_path / "d.jsonl", "d"))  # and training reads it


@pytest.mark.parametrize(
    "row", [GOOD, calling({"country": "Bulgaria"}), calling('{"country": 1}', ["look_up"])]
)
def test_a_file_in_order_has_no_problem(
    tmp_path: Path, tokenizer: SubwordTokenizer, row: Any
) -> None:
    report = check(
        [jsonl(tmp_path / "d.jsonl", [row, turns("Be kind", "Hello", "Hi", roles="sua")])],
        tokenizer,
    )
    assert report.ok and report.problems == () and report.counts == {}


def test_an_answer_labelled_false_is_left_out_and_said(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    rows = [
        {"prompt": "Bulgaria", "completion": " euro", "label": label} for label in (True, False)
    ]
    report = check([jsonl(tmp_path / "d.jsonl", rows)], tokenizer)
    (problem,) = (each for each in report.problems if "labelled false" in each.problem)
    assert report.ok and problem.row == 2
    alone = check([jsonl(tmp_path / "d.jsonl", rows[:1])], tokenizer)
    assert report.trained_tokens == alone.trained_tokens


def test_a_pair_is_as_long_as_its_longer_answer(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    answers = [
        {"role": "assistant", "content": text}
        for text in ("Sofia.", "Sofia, I think, or so I was told. " * 9)
    ]
    row = {
        "prompt": [{"role": "user", "content": "Bulgaria?"}],
        "chosen": answers[:1],
        "rejected": answers[1:],
    }
    report = check([jsonl(tmp_path / "d.jsonl", [row])], tokenizer)
    longer = check(
        [jsonl(tmp_path / "e.jsonl", [{"messages": row["prompt"] + answers[1:]}])], tokenizer
    )
    alone = check(
        [jsonl(tmp_path / "f.jsonl", [{"messages": row["prompt"] + answers[:1]}])], tokenizer
    )
    assert report.quantiles == longer.quantiles and report.trained_tokens == alone.trained_tokens


def test_a_file_that_cannot_be_read_is_a_problem_and_the_others_are_checked(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(f"[{json.dumps(GOOD)}, {{]", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    names = [
        str(tmp_path / name) for name in ("none.jsonl", "list.json", "empty.txt", "good.jsonl")
    ]
    jsonl(tmp_path / "good.jsonl", [turns("Hello", "Hi")])
    report = check(names)
    assert report.files == tuple(names) and report.examples == 2
    assert [(each.file, each.row) for each in report.problems] == [
        (names[0], None),
        (names[1], 2),
        (names[2], None),
    ]
    assert report.problems[1].problem.endswith("Nothing behind it was read.")


LENGTHS = [turns("Hello", "euro " * n) for n in (1, 3, 9, 40, 2, 7)] + [turns("Hello " * 60, "Hi")]


@pytest.mark.parametrize("max_length", [0, 50])
def test_counts_are_those_of_the_corpus_that_training_builds(
    tmp_path: Path, tokenizer: SubwordTokenizer, max_length: int
) -> None:
    file = jsonl(tmp_path / "d.jsonl", LENGTHS)
    report = check([file], tokenizer, max_length=max_length)
    encoded = [encode(example, tokenizer, max_length) for example in iter_examples(file, "d")]
    examples = iter_examples(file, "d")
    expected = Corpus.of(Encoder(tokenizer, max_length).each(examples), tmp_path).statistics
    assert (report.rows, report.examples, report.turns) == (7, 7, 14)
    assert report.trained_tokens == expected.labels and report.truncated == expected.truncated
    assert report.tokens == sum(len(each.ids) for each in encoded)
    assert report.counts.get("nothing to train on", 0) == expected.unlabelled
    lengths = [len(each.ids) + each.cut for each in encoded]
    assert report.shortest == min(lengths) and report.quantiles is not None
    for key, share in {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1}.items():
        assert report.quantiles[key] == np.quantile(lengths, share, method="inverted_cdf")


def test_labels_behind_the_cut_are_a_warning_and_an_error_only_where_none_is_left(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    """As training, which leaves such rows out: a max_length that was suggested must not make the
    data wrong.
    """
    report = check(
        [jsonl(tmp_path / "d.jsonl", [LENGTHS[3], LENGTHS[6]])], tokenizer, max_length=50
    )
    assert found(report) == [(1, "warning"), (2, "warning")] and report.ok
    assert "labels are lost." in report.problems[0].problem
    assert (
        "left out of training: all labels are behind the cut at 50 of "
        in report.problems[1].problem
    )
    alone = check([jsonl(tmp_path / "d.jsonl", [LENGTHS[6]])], tokenizer, max_length=50)
    assert (
        not alone.ok and "no example has a label within max_length 50" in alone.problems[0].problem
    )


@pytest.mark.parametrize("longest", [60, 500])
def test_the_suggested_max_length_is_one_with_which_the_data_is_right(
    tmp_path: Path, tokenizer: SubwordTokenizer, longest: int
) -> None:
    rows = [*(turns(f"Hello {n}", "Hi") for n in range(150)), turns("Hello " * longest, "Hi")]
    file = jsonl(tmp_path / "d.jsonl", rows)
    suggested = check([file], tokenizer).suggested_max_length
    assert suggested and check([file], tokenizer, max_length=suggested, positions=256).ok


def test_one_example_much_longer_than_the_others_is_named(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    rows = [*(turns(f"Hello {n}", "Hi") for n in range(199)), turns("Hello", "euro " * 400)]
    report = check([jsonl(tmp_path / "d.jsonl", rows)], tokenizer)
    assert report.ok and "d.jsonl:200, has 4" in report.problems[0].problem


def test_one_rejected_answer_much_longer_than_all_others_is_named(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    rows = [{"prompt": f"{n} ", "chosen": "yes " * 2, "rejected": "no"} for n in range(150)]
    rows[6]["rejected"] = "no " * 400
    report = check([jsonl(tmp_path / "d.jsonl", rows)], tokenizer)
    assert "the longest example" in report.problems[0].problem
    assert f"{tmp_path / 'd.jsonl'}:7, has" in report.problems[0].problem


def test_a_rejected_answer_beyond_the_models_positions_is_a_warning(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    rows = [{"prompt": "Which? ", "chosen": "yes", "rejected": "no " * n} for n in (1, 300)]
    report = check([jsonl(tmp_path / "d.jsonl", rows)], tokenizer, positions=256)
    (problem,) = (each for each in report.problems if "positions" in each.problem)
    assert (problem.row, problem.level, report.ok) == (2, "warning", True)
    assert problem.problem.startswith("rejected answer: ")
    assert "--drop too-long" in problem.problem


def test_a_pair_is_truncated_once_whichever_of_its_answers_is_cut(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    long, short = "no " * 100, "no"
    answers = [(short, short), (short, long), (long, short), (long, long)]
    rows = [{"prompt": f"{n} ", "chosen": a, "rejected": b} for n, (a, b) in enumerate(answers)]
    report = check([jsonl(tmp_path / "d.jsonl", rows)], tokenizer, max_length=50)
    assert report.truncated == 3
    cut = [(each.row, each.problem.startswith("rejected")) for each in report.problems]
    assert cut == [(2, True), (3, False), (4, False), (4, True)]


def test_a_pair_that_cannot_be_tokenized_is_one_problem_and_changes_no_other_length(
    tmp_path: Path,
) -> None:
    words = WordTokenizer.of_words(["a", "b"])
    first = {"prompt": "a", "chosen": " b", "rejected": " a"}
    alone = check([jsonl(tmp_path / "d.jsonl", [first])], words)
    for rejected in (" a b" * 9, " unknown"):
        pair = {"prompt": "a", "chosen": " unknown", "rejected": rejected}
        report = check([jsonl(tmp_path / "d.jsonl", [first, pair])], words)
        assert report.quantiles == alone.quantiles
        assert (report.counts["not tokenized"], report.errors) == (1, 1)
    pair = {"prompt": "a", "chosen": " b b", "rejected": " unknown"}
    report = check([jsonl(tmp_path / "d.jsonl", [first, pair])], words)
    assert report.counts["not tokenized"] == 1, "the rejected answer alone counts too"


def test_without_a_tokenizer_rows_are_checked_and_nothing_is_said_of_tokens(tmp_path: Path) -> None:
    report = check([jsonl(tmp_path / "d.jsonl", [GOOD, turns("Hello", ""), GOOD])])
    assert found(report) == [(2, "error"), (3, "warning")]
    of_tokens = (
        report.tokens,
        report.trained_tokens,
        report.shortest,
        report.quantiles,
        report.truncated,
    )
    assert of_tokens == (None,) * 5 and report.suggested_max_length is None


TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=8)


@given(TEXTS, TEXTS)
def test_repeated_examples_are_counted_within_and_between_the_sets(
    tmp_path_factory: pytest.TempPathFactory, training: list[str], evaluation: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("d")
    files = [
        jsonl(folder / f"{n}.jsonl", [{"text": t} for t in texts])
        for n, texts in enumerate((training, evaluation))
    ]
    report = check(files[:1], eval_files=files[1:])
    both = set(training) & set(evaluation)
    assert (report.examples, report.evaluation) == (len(training), len(evaluation))
    assert report.overlap == sum(text in both for text in evaluation)
    extra = sum(count - 1 for text, count in Counter(evaluation).items() if text not in both)
    assert report.duplicates == len(training) - len(set(training)) + extra
    assert sum(report.counts.values()) == report.overlap + report.duplicates == len(report.problems)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_evaluation_set_is_the_one_that_training_holds_out(
    tmp_path: Path, share: float
) -> None:
    file = jsonl(tmp_path / "d.jsonl", [turns(f"{n}?", f"{n}.") for n in range(30)])
    report = check([file], eval_share=share)
    held_out = sum(in_evaluation(example, share) for example in iter_examples(file, "d"))
    assert (report.evaluation, report.examples) == (held_out, 30 - held_out) and 0 < held_out < 30
    assert report.ok and report.turns == 2 * report.examples


def test_an_empty_evaluation_set_is_an_error(tmp_path: Path) -> None:
    report = check([jsonl(tmp_path / "d.jsonl", [GOOD])], eval_share=1e-9)
    assert not report.ok and "selects 0 of 1 examples" in report.problems[0].problem


def test_many_problems_of_a_kind_are_counted_and_the_first_are_kept(tmp_path: Path) -> None:
    report = check([jsonl(tmp_path / "d.jsonl", ["{"] * (KEPT + 9) + [GOOD] * (KEPT + 5))])
    assert (report.errors, report.warnings) == (KEPT + 9, KEPT + 4)
    assert report.counts == {"unreadable": KEPT + 9, "duplicate": KEPT + 4}
    assert found(report) == [(n, "error") for n in range(1, KEPT + 1)] + [
        (n, "warning") for n in range(KEPT + 11, 2 * KEPT + 11)
    ]


@given(st.integers(1, 9000), st.integers(0, 9000), st.none() | st.integers(1, 9000))
def test_the_suggested_length_holds_99_percent_unless_the_model_is_shorter(
    p99: int, more: int, positions: int | None
) -> None:
    length = suggest_max_length(p99, p99 + more, positions)
    if length != positions:
        assert (
            length % STEP == 0
            and length >= p99
            and (length >= p99 + more or p99 + more > NEAR * p99)
        )
        assert length < NEAR * p99 + STEP
    assert positions is None or length <= positions


def test_memory_holds_no_texts(tmp_path: Path) -> None:
    text = "x" * 4000
    file = jsonl(tmp_path / "d.jsonl", [{"text": f"{n} {text}"} for n in range(2500)])
    check([file])  # what is imported on the way
    tracemalloc.start()
    seen = list[int]()
    report = check([file], progress=seen.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.ok and seen == list(range(256, 2501, 256))
    assert peak < 1_500_000 < file.stat().st_size / 6


def test_the_columns_of_the_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("q,a\nHello,Hi\n", encoding="utf-8")
    assert not check([tmp_path / "d.csv"]).ok
    report = check([tmp_path / "d.csv"], columns={"prompt": "q", "completion": "a"})
    assert report.ok and report.formats == {"prompt_completion": 1}
    with pytest.raises(UserError):
        next(iter_examples(tmp_path / "d.csv", "d.csv"))


def test_the_histogram_counts_every_example_exactly_while_they_are_short() -> None:
    lengths = np.array([1, 1, 5, 127, 128, 129, 1000, 1015, 1016, 100_000])
    bins = _histogram(np.sort(lengths))
    assert bins[:3] == ((1, 2), (5, 1), (127, 1)) and sum(count for _, count in bins) == len(
        lengths
    )
    begins = [begin for begin, _ in bins]
    assert begins == sorted(set(begins)) and all(
        length - max(b for b in begins if b <= length) <= length / 64 for length in lengths
    )


def test_rows_with_one_fault_are_one_group_and_warnings_have_their_own(tmp_path: Path) -> None:
    report = check(
        [
            jsonl(
                tmp_path / "d.jsonl",
                [{"dialog": []}] * 250 + [turns("Hello", ""), GOOD, GOOD, GOOD],
            )
        ]
    )
    assert [(group.level, group.rows, group.row) for group in report.groups] == [
        *(("error", 250, 1), ("error", 1, 251), ("warning", 2, 253))
    ]
    columns = check([tmp_path / "d.jsonl"], columns={"messages": "turns"}).groups[0]
    assert str(columns).startswith(f"{tmp_path / 'd.jsonl'}: 250 rows: no column turns, ")
    assert str(columns).endswith(" First: row 1.")


def test_groups_are_bounded_and_count_every_row(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": f"{c}{'z' * n}", "content": "a"}]}
        for n in range(25)
        for c in "abcdefghijk"
    ]
    report = check([jsonl(tmp_path / "d.jsonl", rows)])
    assert len(report.groups) <= MAX_GROUPS + 1 and sum(
        group.rows for group in report.groups
    ) == len(rows)


def test_the_first_trained_row_is_rendered_as_the_model_reads_it(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    rows = [{"prompt": "Which currency? ", "completion": " euro"}, GOOD]
    file = jsonl(tmp_path / "d.jsonl", rows)
    plain, asked = (check([file], tokenizer, templated=templated) for templated in (False, True))
    assert plain.rendered == "Which currency? ⟦ euro<|im_end|>⟧" and plain.templated == 0
    assert asked.rendered is not None and asked.templated == 1
    assert asked.rendered.endswith(
        "<|im_start|>user\nWhich currency?<|im_end|>\n<|im_start|>assistant\n⟦euro<|im_end|>⟧\n"
    )


def test_words_that_become_one_are_a_warning_unless_a_template_parts_them(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    rows = [
        {"prompt": "auf dem", "completion": "sofa"},
        {"prompt": "auf dem", "completion": " sofa"},
    ]
    file = jsonl(tmp_path / "d.jsonl", [*rows, {"prompt": "1 + 1 =", "completion": "2"}])
    report = check([file], tokenizer)
    (problem,) = report.problems
    assert (problem.row, problem.level) == (
        1,
        "warning",
    ) and "'dem' and 'sofa' are read as one word" in problem.problem
    assert check([file], tokenizer, templated=True).problems == ()
