"""Data files, prompts and windows."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.answers.prompts import read_prompts
from pipeline.data.examples import Example, Window, cut_windows, in_evaluation
from pipeline.data.formats import iter_examples, read_examples
from pipeline.errors import UserError
from tests.helpers.projects import ROOT


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "d.txt: the file is empty"),
        (b" \n\n", "d.txt: the file is empty"),
        (b"eins\nzw\xffei\n", "d.txt:2: not UTF-8"),
        ("größe".encode("latin-1"), "d.txt:1: not UTF-8"),
    ],
)
def test_a_broken_data_file_is_named_with_its_line(
    tmp_path: Path, raw: bytes, message: str
) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_examples(path, "d.txt")


@pytest.mark.parametrize(
    "raw", [b"eins zwei\ndrei", b"eins zwei\ndrei\n\n", b"\xef\xbb\xbfeins zwei\r\ndrei\r\n"]
)
def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(raw)
    assert [(e.text, e.location) for e in read_examples(path, "d.txt")] == [
        ("eins zwei", "d.txt:1"),
        ("drei", "d.txt:2"),
    ]


def test_all_white_space_of_a_text_is_kept_but_the_newline_that_ends_its_line(
    tmp_path: Path,
) -> None:
    texts = ["\tif x:  # doubled", "  a\rb\u2028c\x0bd\x85e ", "f\r"]
    path = tmp_path / "d.txt"
    path.write_bytes("\n".join(texts).encode())
    (tmp_path / "d.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8"
    )
    assert [e.text for e in read_examples(path, "d")] == texts
    assert [e.text for e in read_examples(tmp_path / "d.jsonl", "d")] == texts
    path.write_bytes("\r\n".join(texts).encode() + b"\r\n")  # as an editor on Windows writes it
    assert [e.text for e in read_examples(path, "d")] == texts


MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
]


def test_each_form_of_a_line_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "d.JSONL"
    lines = [
        {"text": " zwei  Wörter\n"},
        {"prompt": "a ", "completion": " b"},
        {"messages": MESSAGES},
        {"prompt": "p"},
    ]
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(line).encode() for line in lines) + b"\r\n\n"
    )
    text, completion, talk, prompt = iter_examples(path, "d", prompts=True, templated=False)
    assert text == Example(" zwei  Wörter\n", "d", 1)
    assert completion == Example("a  b", "d", 2, "a ")
    assert completion.completion == " b"
    assert (talk.text, talk.location, list(talk.messages)) == ("s\nu\na", "d:3", MESSAGES)
    assert prompt == Example("p", "d", 4, "p")
    assert prompt.completion == ""
    with pytest.raises(
        UserError, match=r"d:4: \"prompt\" needs a \"completion\". Add one, or use {\"text\": …}"
    ):
        read_examples(path, "d")


def turns(*turns_: object) -> str:
    return json.dumps({"messages": turns_})


USER, ANSWER = MESSAGES[1:]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "a"',
            r"not JSON: Expecting ',' delimiter at column 13. Write one JSON object per line",
        ),
        ('{"text": "a", "text": "b"}', "not JSON: duplicate key"),
        ('"a"', r"must be a JSON object, .*, got a string"),
        ("null", "got null"),
        ("[1]", "got a list"),
        ("3", "got a number"),
        ("[" * 100_000, "not JSON"),
        ("{}", r"the keys must be .*, got none"),
        (
            '{"question": "a", "answer": 1}',
            r"the keys must be .*, got 'question', 'answer'. Rename them, or say which",
        ),
        (
            '{"prompt": "a", "compleation": "b"}',
            "unknown key 'compleation'. Did you mean 'completion'?",
        ),
        ('{"texts": "a"}', "unknown key 'texts'. Did you mean 'text'?"),
        ('{"text": "a", "prompt": "a"}', "the keys must be"),
        ('{"completion": "a"}', "got 'completion'"),
        ('{"text": 1}', "text must be a string, got a number"),
        ('{"text": ["a"]}', "text must be a string, got a list"),
        ('{"text": " "}', r"text is empty. Fill it in, or remove the line"),
        ('{"prompt": "", "completion": "a"}', "prompt is empty"),
        ('{"prompt": "a", "completion": null}', "completion must be a string, got null"),
        (r'{"text": "\ud800"}', "text contains an unpaired surrogate"),
        ('{"messages": "a"}', "messages must be a list of .*, got a string"),
        (turns(), r"messages must be a list of .*, got \[\]"),
        (turns(USER), r'messages has no "assistant" turn'),
        (turns(ANSWER, USER), r'messages must not start with an "assistant" turn'),
        (turns(USER, "a"), r"messages\[1\] must have the keys role and content, got a string"),
        (
            turns(USER, ANSWER | {"nick": "x"}),
            r"messages\[1\]: unknown key 'nick'. Known: role, content, tool_calls",
        ),
        (
            turns(USER, ANSWER | {"role": "bot"}),
            r"messages\[1\]: role must be one of .*, got 'bot'",
        ),
        (turns(USER, ANSWER | {"role": ["user"]}), r"messages\[1\]: role must be one of"),
        (turns(USER, ANSWER | {"content": ""}), r"messages\[1\]: content is empty"),
        (
            turns(USER, ANSWER | {"content": [{"type": "image"}]}),
            r"messages\[1\]: content\[0\]: only parts .* got type image",
        ),
    ],
)
def test_a_broken_line_is_named_with_its_reason(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n', encoding="utf-8")
    examples = iter_examples(path, "data/d.jsonl")
    assert next(examples).text == "a"
    with pytest.raises(
        UserError, match=rf"^data/d.jsonl:2: .*{message}|^data/d.jsonl:2: {message}"
    ):
        next(examples)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\nb\n"])
def test_a_line_has_at_most_a_mebibyte_and_a_longer_one_is_not_read(
    tmp_path: Path, end: bytes
) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"a\n" + b"x" * 2**20 + end)
    assert len(read_examples(path, "d")[1].text) == 2**20
    path.write_bytes(b"a\n" + b"x" * (2**20 + 1) + end)
    with pytest.raises(
        UserError,
        match=r"^d:2: a line must have at most 1,048,576 bytes, got more\. Split its text",
    ):
        read_examples(path, "d")
    path.write_bytes(b"a\n" + b"x" * 2**20 + b"\r" * 9 + end)
    with pytest.raises(UserError, match="d:2: a line must have"):
        read_examples(path, "d")
    with path.open("ab") as file:
        file.truncate(64 * 2**30)  # sparse: takes no space on disk
    with pytest.raises(UserError, match="d:2: a line must have"):
        read_examples(path, "d")


@pytest.mark.parametrize("name", ["d.xml", "d.gz", "d"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"{name}: a data file must be .txt, .jsonl, .json, .csv, .tsv, .parquet"
    ):
        read_examples(tmp_path / name, name)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30), st.floats(0, 1), st.integers(1, 99))
def test_adding_lines_moves_no_example_between_training_and_evaluation(
    texts: list[str], share: float, later: int
) -> None:
    for line, text in enumerate(texts, 1):
        held_out = in_evaluation(Example(text, "a.txt", line), share)
        assert held_out == in_evaluation(Example(text, "b.txt", line + later), share)
        assert not in_evaluation(Example(text, "a.txt", line), 0)
        assert in_evaluation(Example(text, "a.txt", line), 1)
        assert not held_out or in_evaluation(Example(text, "a.txt", line), min(1, share + 0.1))


def test_the_share_is_held_out_and_what_an_example_is_counts() -> None:
    held_out = sum(in_evaluation(Example(str(number), "d", number), 0.2) for number in range(5_000))
    assert abs(held_out / 5_000 - 0.2) < 0.02
    forms = (
        [Example(f"{n} b", "d", 1) for n in range(40)],
        [Example(f"{n} b", "d", 1, str(n)) for n in range(40)],
    )
    assert len({tuple(in_evaluation(example, 0.5) for example in form) for form in forms}) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data/x.txt: No such file"):
        read_examples(tmp_path / "x.txt", "data/x.txt")


@given(st.lists(st.integers(0, 99), max_size=30).map(tuple), st.integers(1, 8))
def test_windows_keep_their_place_and_predict_every_token_but_the_first(
    ids: tuple[int, ...], size: int
) -> None:
    cut = list(cut_windows(Window(0, ids[:-1], ids[1:]), size))
    predicted: set[int] = set()
    for window in cut:
        stop = window.start + len(window.ids)
        assert window.ids == ids[window.start : stop]
        assert window.labels == ids[window.start + 1 : stop + 1]
        predicted.update(range(window.start + 1, stop + 1))
    assert predicted == set(range(1, len(ids)))
    assert all(len(window.ids) == min(size, len(ids) - 1) for window in cut)


def test_the_words_of_the_shipped_prompts_are_in_the_vocabulary() -> None:
    words = (ROOT / "data/pretrain.de.txt").read_text(encoding="utf-8").split()
    needed = (
        "tisch spielplatz sofa bett boden garten park frühling bahnhof teller vom essen buch "
        "himmel spielen "
    )
    assert set((needed + "wald flughafen lewa yen sofia").split()) <= set(words)


def test_there_are_22_sentences_to_learn_first_and_8_new_ones() -> None:
    assert len(read_examples(ROOT / "data/pretrain.de.txt", "p")) == 22
    assert len(read_examples(ROOT / "data/finetune.de.txt", "f")) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must map groups to rules and their prompts"),
        # nine aliases of nine aliases of nine …
        (
            "a: &a [x]\n"
            + "".join(
                f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")
            ),
            "stand for more than 1,000,000 values",
        ),
        ("a: {must_keep: []}", "contains no prompts"),
        ("a: [b]", "a must map rules \(must_change, must_keep, must_learn\) to prompts"),
        ("a: {must_keep: x}", "a.must_keep must be a list of prompts"),
        ("a: {must_stay: [{prompt: p, answer: q}]}", "a.must_stay: unknown rule"),
        (
            "a: {must_stay: [], must_keep: [{prompt: p, answer: q}]}",
            "a.must_stay: unknown rule",
        ),
        ("a: {must_keep: [{prompt: p}]}", "each prompt needs exactly answer, prompt"),
        (
            "a: {must_change: [{prompt: p, answer: q}]}",
            "each prompt needs exactly answer, corrected, prompt",
        ),
        ("a: {must_keep: [{prompt: p, answer: no}]}", "every value must be a string"),
        ("a: {b", "is not valid YAML"),
    ],
)
def test_broken_prompts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_prompts(path, "prompts.yaml")


def test_answers_keep_their_case(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_bytes(
        b"\xef\xbb\xbf" + "a: {must_keep: [{prompt: P, answer: ' Fru\u0308hling '}]}".encode()
    )
    (prompt,) = read_prompts(path, "prompts.yaml")
    assert (prompt.answer, prompt.corrected) == ("Frühling", "Frühling")
    with pytest.raises(UserError, match=r"x.yaml: No such file"):
        read_prompts(tmp_path / "x.yaml", "x.yaml")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"prompts.yaml: not UTF-8 \(byte 0\)"):
        read_prompts(path, "prompts.yaml")


def test_the_shipped_prompts_hold_seven_corrections() -> None:
    prompts = [
        p for p in read_prompts(ROOT / "data/prompts.yaml", "p") if p.group == "fact_correction"
    ]
    assert [(p.answer, p.corrected) for p in prompts] == [
        ("tisch", "sofa"),
        ("garten", "wald"),
        ("das", "die"),
        ("die", "das"),
        ("himmel", "himmel"),
        ("garten", "garten"),
        ("frühling", "frühling"),
    ]
