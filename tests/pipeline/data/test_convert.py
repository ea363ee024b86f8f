"""Data files in other formats and containers: the same examples there and back, or a reason why
not.
"""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.convert import CHOICES, convert
from pipeline.data.examples import Example
from pipeline.data.formats import FORMATS, read_examples
from pipeline.data.masking import Encoder
from pipeline.errors import UserError
from tests.helpers.json_files import read_json, write_jsonl
from tests.helpers.projects import ROOT
from tests.helpers.tokenizers import SMOLLM2, tokenizer_with

Record = dict[str, Any]
CONTAINERS = [
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".feather",
    ".jsonl.gz",
    ".json.zst",
    ".csv.gz",
]
CONTAINERS += [".tsv.zst", ".JSONL"]

# Line ends, quotes, separators and what looks like JSON; a zero byte or a byte order mark is no
# text everywhere.
LETTERS = st.sampled_from([*"ab \n\r\t,;\"'\\{}[]é€\u2028\x1b", "\r\n", '[{"a": 1}]', "null", "1"])
TEXT = st.lists(LETTERS, min_size=1, max_size=6).map("".join).filter(str.strip)
NAME = st.sampled_from(["look_up", "answer"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=3,
)
FUNCTION = st.fixed_dictionaries(
    {"name": NAME, "arguments": st.dictionaries(TEXT, VALUE, max_size=2)}
)
CALL = FUNCTION.map(lambda function: {"type": "function", "function": function})
TOOLS = st.lists(
    NAME.map(lambda name: {"type": "function", "function": {"name": name, "parameters": {}}}),
    min_size=1,
    max_size=2,
)


def turn(role: str, **more: Any) -> Any:
    return st.fixed_dictionaries({"role": st.just(role), "content": TEXT, **more})


PAIR = st.tuples(turn("user"), turn("assistant")).map(list)
EXCHANGES = st.lists(PAIR, min_size=1, max_size=2).map(
    lambda pairs: [message for pair in pairs for message in pair]
)
SYSTEM = st.lists(turn("system"), max_size=1)
PLAIN = st.tuples(SYSTEM, EXCHANGES).map(lambda parts: parts[0] + parts[1])
CALLING = st.fixed_dictionaries(
    {
        "role": st.just("assistant"),
        "content": st.none(),
        "tool_calls": st.lists(CALL, min_size=1, max_size=2),
    }
)
SPOKEN = st.tuples(turn("user"), CALLING, turn("tool"), turn("assistant", train=st.booleans())).map(
    list
)
FULL = st.tuples(
    turn("developer"),
    turn("user", name=TEXT),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": TEXT | st.just(""),
            "tool_calls": st.lists(
                CALL.map(lambda call: {"id": "c1", **call}), min_size=1, max_size=1
            ),
            "reasoning_content": TEXT,
        }
    ),
    turn("tool", tool_call_id=TEXT),
    turn("assistant", train=st.booleans()),
).map(list)


def conversation(turns: Any) -> Any:
    return st.fixed_dictionaries({"messages": turns}, optional={"tools": TOOLS})


# What each format can hold, as rows of a .jsonl file.
ROWS: dict[str, Any] = {
    "text": st.fixed_dictionaries({"text": TEXT}),
    "prompt_completion": st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    "alpaca": st.fixed_dictionaries({"messages": PLAIN}),
    "sharegpt": conversation(SPOKEN | PLAIN),
    "messages": conversation(FULL | SPOKEN | PLAIN),
}


def contents(path: Path) -> list[Example]:
    """The examples of a file, without the numbers of their rows."""
    return [replace(example, line=0) for example in read_examples(path, "d")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("format_", ROWS)
@settings(max_examples=40)
@given(st.data())
def test_there_and_back_gives_the_same_examples(
    folder: Path, format_: str, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(ROWS[format_], min_size=1, max_size=3))
    name = data.draw(st.sampled_from(CONTAINERS))
    original = write_jsonl(folder / "original.jsonl", rows)
    there, back = folder / f"there{name}", folder / "back.jsonl"
    done = convert(original, there, format_, force=True)
    assert (done.rows, done.format, done.notes) == (len(rows), format_, ())
    own = "messages" if "messages" in rows[0] else format_
    convert(there, back, own, force=True)
    assert contents(there) == contents(original) == contents(back)


@given(st.lists(TEXT.filter(lambda text: "\n" not in text and not text.endswith("\r")), min_size=1))
def test_texts_are_the_same_in_a_txt_file(folder: Path, texts: list[str]) -> None:
    convert(
        write_jsonl(folder / "t.jsonl", [{"text": text} for text in texts]),
        folder / "t.txt.gz",
        force=True,
    )
    assert [example.text for example in contents(folder / "t.txt.gz")] == texts
    assert gzip.decompress((folder / "t.txt.gz").read_bytes()).decode() == "".join(
        f"{text}\n" for text in texts
    )


@pytest.mark.slow
def test_fifty_conversations_have_the_same_tokens_and_labels_in_every_format_and_container(
    tmp_path: Path,
) -> None:
    encoder = Encoder(tokenizer_with(tmp_path / "model", SMOLLM2))
    roles = ("system", "user", "assistant", "user", "assistant")
    rows = [
        {"messages": [{"role": r, "content": f"{r} {n}\nHello"} for r in roles[n % 2 :]]}
        for n in range(50)
    ]
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    expected = [encoded for _, encoded in encoder.each(read_examples(original, "d"))]
    for format_ in ("messages", "alpaca", "sharegpt"):
        for container in CONTAINERS:
            convert(original, tmp_path / f"{format_}{container}", format_)
            examples = read_examples(tmp_path / f"{format_}{container}", "d")
            assert [encoded for _, encoded in encoder.each(examples)] == expected


LABELLED = [
    {"prompt": "p", "completion": " a", "label": True},
    {"prompt": "p", "completion": " b", "label": False},
]
PREFERENCES = [
    LABELLED,
    [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
            "label": label,
        }
        for label in (False, True)
    ],
    [{"prompt": "p", "chosen": "a b", "rejected": "a c"}],
    [{"chosen": "x", "rejected": "y"}],
    [{"chosen": "\nx", "rejected": "\ny"}],
    [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ],
    [
        {
            "prompt": [{"role": role, "content": role} for role in ("user", "assistant", "user")],
            "completion": [
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c", "train": False},
            ],
        }
    ],
]


@pytest.mark.parametrize("rows", PREFERENCES)
@pytest.mark.parametrize("container", [".jsonl", ".csv", ".parquet"])
def test_without_a_format_rows_stay_in_their_own(
    tmp_path: Path, rows: list[Record], container: str
) -> None:
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    done = convert(original, tmp_path / f"there{container}")
    own = (
        "unpaired_preference"
        if "label" in rows[0]
        else "preference"
        if "rejected" in rows[0]
        else "chat_prompt"
    )
    assert done.format == own and done.notes == ()
    assert contents(tmp_path / f"there{container}") == contents(original)


def test_rows_of_several_formats_stay_as_they_are_where_each_row_has_its_own_keys(
    tmp_path: Path,
) -> None:
    rows: list[Record] = [{"text": "a"}, {"prompt": "b", "completion": "c"}, {"messages": QUESTION}]
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    assert convert(original, tmp_path / "d.json").format == "mixed"
    assert read_json(tmp_path / "d.json") == rows
    with pytest.raises(
        UserError, match=r"d.jsonl:2: rows of prompt_completion and text do not fit into one table"
    ):
        convert(original, tmp_path / "d.parquet")


QUESTION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_a_question_with_one_answer_is_a_pair_and_the_other_way_round_and_both_are_told(
    tmp_path: Path,
) -> None:
    original = write_jsonl(tmp_path / "d.jsonl", [{"messages": QUESTION}])
    done = convert(original, tmp_path / "pairs.csv", "prompt_completion")
    assert done.notes == (
        f"{original}: conversations written as prompt and completion, which get no chat template: "
        "1",
    )
    assert (tmp_path / "pairs.csv").read_bytes() == b"prompt,completion\r\nq,a\r\n"
    done = convert(tmp_path / "pairs.csv", tmp_path / "back.jsonl", "messages")
    assert done.notes[0].endswith(
        "prompts with completions written as turns, which get a chat template: 1"
    )
    assert read_json(tmp_path / "back.jsonl") == {"messages": QUESTION}


def test_answers_labelled_false_are_left_out_of_what_has_no_labels(tmp_path: Path) -> None:
    original = write_jsonl(tmp_path / "d.jsonl", LABELLED)
    done = convert(original, tmp_path / "new.jsonl", "prompt_completion")
    assert done.notes == (f"{original}: answers labelled false left out: 1",)
    assert (tmp_path / "new.jsonl").read_text(
        encoding="utf-8"
    ) == '{"prompt": "p", "completion": " a"}\n'


def test_a_label_of_pandas_is_a_label(tmp_path: Path) -> None:
    """A column in which a value is missing has floats."""
    rows = [{"prompt": "p", "completion": " a", "label": label} for label in (1.0, 0.0)]
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    assert [example.desirable for example in read_examples(original, "d")] == [True, False]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    pair = {
        "prompt": QUESTION[:1],
        "chosen": QUESTION[1:],
        "rejected": [{"role": "assistant", "content": "b"}],
        "id": 1,
    }
    original = write_jsonl(
        tmp_path / "d.jsonl", [pair, {key: pair[key] for key in pair if key != "id"}]
    )
    done = convert(original, tmp_path / "new.jsonl", "messages")
    assert done.notes == (
        f"{original}: not used: id (1 row)",
        f"{original}: rejected answers left out: 2",
    )
    assert all(
        not example.rejected and not example.untrained
        for example in contents(tmp_path / "new.jsonl")
    )


CALLS = [
    QUESTION[0],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}],
    },
]
REFUSED: dict[str, tuple[Record, str, str, str]] = {
    "tool calls in alpaca": ({"messages": CALLS}, "alpaca", ".jsonl", "it has tools or tool calls"),
    "ids of calls in sharegpt": (
        {"messages": CALLS},
        "sharegpt",
        ".jsonl",
        "tool calls with an id",
    ),
    "names in sharegpt": (
        {"messages": [{**QUESTION[0], "name": "n"}, QUESTION[1]]},
        "sharegpt",
        ".jsonl",
        "its turns have name",
    ),
    "developers in sharegpt": (
        {"messages": [{"role": "developer", "content": "d"}, *QUESTION]},
        "sharegpt",
        ".json",
        "it has a developer turn",
    ),
    "several turns in a pair": (
        {"messages": QUESTION * 2},
        "prompt_completion",
        ".csv",
        "not one question of a user and one answer",
    ),
    "a mask in a pair": (
        {"messages": [QUESTION[0], {**QUESTION[1], "train": False}]},
        "prompt_completion",
        ".csv",
        "assistant turns that are not trained on",
    ),
    "two questions in alpaca": (
        {"messages": [QUESTION[0], *QUESTION]},
        "alpaca",
        ".csv",
        "one answer each",
    ),
    "a conversation as text": (
        {"messages": QUESTION},
        "text",
        ".jsonl",
        "which part of it is trained on",
    ),
    "a completion as text": (
        {"prompt": "a", "completion": "b"},
        "text",
        ".txt",
        "which part of it is trained on",
    ),
    "a text as a conversation": ({"text": "a"}, "messages", ".jsonl", "it has no prompt"),
    "answers without a prompt as a conversation": (
        {"chosen": "x", "rejected": "y"},
        "messages",
        ".jsonl",
        "it has no prompt",
    ),
    "answers without a prompt as a pair": (
        {"chosen": "\nx", "rejected": "\ny"},
        "prompt_completion",
        ".jsonl",
        "it has no prompt",
    ),
    "lines in a line": ({"text": "a\nb"}, "text", ".txt", "the text has several lines"),
    "a zero byte in a line": ({"text": "a\0b"}, "text", ".txt", "byte 1 is zero"),
    "a byte order mark at the start": (
        {"text": "\ufeffa"},
        "text",
        ".txt",
        "would not give the same example again",
    ),
    "what a .csv file holds turns as": (
        {"text": '[{"role": 1}]'},
        "text",
        ".csv",
        "text must be a string, got a list",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_target_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, case: str
) -> None:
    row, format_, container, message = REFUSED[case]
    original, out = write_jsonl(tmp_path / "d.jsonl", [row]), tmp_path / f"out{container}"
    out.write_text("before", encoding="utf-8")
    with pytest.raises(UserError, match=r"(d\.jsonl|out\.\w+):\d: ") as caught:
        convert(original, out, format_, force=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert out.read_text(encoding="utf-8") == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl", out.name}


def test_what_cannot_be_read_again_names_the_row_of_the_input(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": "x", "rejected": "y"}]
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError) as caught:
        convert(original, tmp_path / "new.csv")
    assert str(caught.value) == (
        f"{original}:2: new.csv would not give the same example again (prompt is empty). Name "
        "another container, such as .jsonl, or another --format."
    )


def test_of_a_txt_file_too_the_rows_that_it_cannot_hold_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": "a\nb"}, {"text": "c"}, {"prompt": "d", "completion": "e"}]
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    done = convert(original, tmp_path / "new.txt", skip_invalid=True)
    assert (tmp_path / "new.txt").read_bytes() == b"c\n" and done.rows == 1
    assert [(group.row, group.rows) for group in done.skipped] == [(1, 1), (3, 1)]


def test_of_a_row_that_is_skipped_nothing_else_is_counted(tmp_path: Path) -> None:
    asked = {"prompt": QUESTION[:1], "chosen": QUESTION[1:]}
    bad = [{"role": "assistant", "content": "b"}]
    system = [{"role": "system", "content": "s"}, *QUESTION[:1]]
    rows = [asked | {"rejected": bad}, {**asked, "prompt": system, "rejected": bad}]
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    done = convert(original, tmp_path / "new.jsonl", "prompt_completion", skip_invalid=True)
    assert done.rows == 1 and f"{original}: rejected answers left out: 1" in done.notes


def test_a_file_is_not_written_over_another_or_itself(tmp_path: Path) -> None:
    original = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}])
    (tmp_path / "link.jsonl").hardlink_to(original)
    (tmp_path / "old.jsonl").write_text("old", encoding="utf-8")
    (tmp_path / "old.jsonl").chmod(0o640)
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in (
        ("d.jsonl", "is the input itself"),
        ("link.jsonl", "is the input itself"),
        ("folder.jsonl", "is a folder"),
        ("new.doc", "the name must end in .jsonl, .json, "),
        ("new.parquet.gz", "also with .gz or .zst"),
    ):
        with pytest.raises(UserError, match=message):
            convert(original, tmp_path / name, force=True)
    with pytest.raises(UserError, match=r"exists. Name another file, or replace it with --force"):
        convert(original, tmp_path / "old.jsonl")
    assert (tmp_path / "old.jsonl").read_text(encoding="utf-8") == "old"
    convert(original, tmp_path / "old.jsonl", force=True)
    assert (tmp_path / "old.jsonl").read_bytes() == b'{"text": "a"}\n' == original.read_bytes()
    assert (tmp_path / "old.jsonl").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_conversion_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    (source := tmp_path / "in.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    command = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from pipeline.data.convert import convert\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(Path('in.jsonl'), Path('out.csv.gz'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2 and not (tmp_path / "out.csv.gz").exists()
    convert(source, tmp_path / "out.csv.gz")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.csv.gz"}


def test_other_libraries_read_what_is_written(tmp_path: Path) -> None:
    rows = [
        {"messages": QUESTION},
        {"messages": [{"role": "system", "content": 's, "s"\n'}, *QUESTION]},
    ]
    original = write_jsonl(tmp_path / "d.jsonl", rows)
    for container in (".parquet", ".arrow", ".feather", ".csv"):
        convert(original, tmp_path / f"d{container}")
    assert pyarrow.parquet.read_table(tmp_path / "d.parquet").to_pylist() == rows
    assert pyarrow.ipc.open_stream(tmp_path / "d.arrow").read_all().to_pylist() == rows
    assert pyarrow.ipc.open_file(tmp_path / "d.feather").read_all().to_pylist() == rows
    with (tmp_path / "d.csv").open(encoding="utf-8", newline="") as file:
        assert [json.loads(row["messages"]) for row in csv.DictReader(file)] == [
            row["messages"] for row in rows
        ]


def test_a_data_set_of_the_hub_becomes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return datasets.Dataset.from_list([{"messages": QUESTION, "id": n} for n in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    done = convert(Path("org/name@v1[train_sft]"), tmp_path / "d.jsonl")
    assert asked[0] == ("org/name", {"revision": "v1", "split": "train_sft"})
    assert (done.rows, done.notes) == (3, ("org/name@v1[train_sft]: not used: id (3 rows)",))
    assert [example.messages for example in contents(tmp_path / "d.jsonl")] == [tuple(QUESTION)] * 3


def test_every_format_to_choose_is_one_that_is_read() -> None:
    assert set(CHOICES) <= set(FORMATS)
