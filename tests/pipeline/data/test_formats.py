"""Formats: the same conversations in each give the same tokens and labels, in every container."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import extract_prompt

from pipeline.data.formats import iter_examples, read_examples
from pipeline.data.masking import Encoder
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.windows import Corpus
from pipeline.errors import UserError
from tests.helpers.containers import TEXT_WRITERS, WRITERS, Records
from tests.helpers.examples import examples_of
from tests.helpers.tokenizers import SMOLLM2, tokenizer_with

Turns = list[dict[str, Any]]
FROM = {"user": "human", "assistant": "gpt", "system": "system"}


def question(first: str, answer: str, system: str) -> Turns:
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def as_json(turns: Turns) -> str:
    return json.dumps(turns, ensure_ascii=False)


# Format → a conversation as its row. A cell of a text container holds turns as JSON.
SHAPES: dict[str, Callable[[Turns], dict[str, Any]]] = {
    "messages": lambda turns: {"messages": turns},
    "messages as JSON": lambda turns: {"messages": as_json(turns)},
    "parts": lambda turns: {
        "messages": [
            turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns
        ]
    },
    "sharegpt": lambda turns: {
        "conversations": [{"from": FROM[turn["role"]], "value": turn["content"]} for turn in turns]
    },
    "sharegpt with roles": lambda turns: {"conversations": turns},
    "sharegpt as JSON": lambda turns: {
        "conversations": as_json(
            [{"from": FROM[turn["role"]], "value": turn["content"]} for turn in turns]
        )
    },
    "alpaca": lambda turns: {
        "instruction": turns[-2]["content"],
        "input": "",
        "output": turns[-1]["content"],
        "system": turns[0]["content"] if len(turns) == 3 else None,
    },
    "prompt and completion": lambda turns: {"prompt": turns[:-1], "completion": turns[-1:]},
    "prompt and text": lambda turns: {"prompt": turns[:-1], "completion": turns[-1]["content"]},
    "prompt as JSON": lambda turns: {
        "prompt": as_json(turns[:-1]),
        "completion": as_json(turns[-1:]),
    },
    "preference": lambda turns: {
        "prompt": turns[:-1],
        "chosen": turns[-1:],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "implicit preference": lambda turns: {
        "chosen": turns,
        "rejected": [*turns[:-1], {"role": "assistant", "content": "no"}],
    },
}
ONLY_TEXTS = {"messages as JSON", "sharegpt as JSON", "prompt as JSON", "alpaca"}


def conversations(count: int) -> list[Turns]:
    draw, words = (
        random.Random(0),
        [
            "Hello",
            "Bulgaria,",
            "the\teuro\nis",
            "",
            "new.",
            "And",
            "“Japan”?",
            "🙂",
            '"Yen"',
            "1+1=2",
            ",;",
            "{'a'}",
        ],
    )

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 12))).strip() or "a"

    return [
        question(text(), f"yes {text()}", text() if number % 3 else "") for number in range(count)
    ]


CONVERSATIONS = conversations(50)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SubwordTokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("t"), SMOLLM2)


def tokens(path: Path, tokenizer: SubwordTokenizer, folder: Path, **options: Any) -> bytes:
    """The token file: ids, and which of them carry a label."""
    folder.mkdir(exist_ok=True)
    corpus = Corpus.of(Encoder(tokenizer).each(iter_examples(path, path.name, **options)), folder)
    assert corpus.statistics.unlabelled == 0 and len(corpus) == len(CONVERSATIONS)
    return (folder / "tokens.bin").read_bytes()


@pytest.fixture(scope="module")
def expected(tokenizer: SubwordTokenizer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What transformers makes of the conversations, with labels on the answers and their ends."""
    folder, rows = tmp_path_factory.mktemp("e"), [{"messages": turns} for turns in CONVERSATIONS]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made = tokens(folder / "d.jsonl", tokenizer, folder)
    hf = tokenizer._hf_tokenizer
    stored = [
        value for turns in CONVERSATIONS for value in hf.apply_chat_template(turns)["input_ids"]
    ]
    assert [
        value if value >= 0 else ~value for value in memoryview(made).cast("i").tolist()
    ] == stored
    return made


@pytest.mark.parametrize("container", WRITERS)
def test_every_format_in_every_container_gives_the_same_tokens_and_labels(
    tmp_path: Path, container: str, tokenizer: SubwordTokenizer, expected: bytes
) -> None:
    for number, (name, shape) in enumerate(SHAPES.items()):
        if name == "prompt as JSON":  # only a cell of a text table can be meant as turns
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        WRITERS[container]([shape(turns) for turns in CONVERSATIONS], folder / container)
        assert tokens(folder / container, tokenizer, folder / "out") == expected, name


@pytest.mark.parametrize("container", sorted(TEXT_WRITERS.keys() - WRITERS.keys()))
@pytest.mark.parametrize("name", sorted(ONLY_TEXTS))
def test_tables_of_text_hold_turns_as_json(
    tmp_path: Path, container: str, name: str, tokenizer: SubwordTokenizer, expected: bytes
) -> None:
    records = [SHAPES[name](turns) for turns in CONVERSATIONS]
    TEXT_WRITERS[container](
        [{key: value or "" for key, value in record.items()} for record in records],
        tmp_path / container,
    )
    assert tokens(tmp_path / container, tokenizer, tmp_path / "out") == expected


def test_columns_say_which_key_of_a_file_is_which(
    tmp_path: Path, tokenizer: SubwordTokenizer, expected: bytes
) -> None:
    rows = [
        {"talk": turns, "messages": "of another kind", "id": n}
        for n, turns in enumerate(CONVERSATIONS)
    ]
    WRITERS["d.parquet"](rows, tmp_path / "d.parquet")
    columns = {"messages": "talk"}
    assert tokens(tmp_path / "d.parquet", tokenizer, tmp_path / "out", columns=columns) == expected
    with pytest.raises(
        UserError,
        match=r"d.parquet:1: no column question, which columns names. It has: talk, messages, id",
    ):
        read_examples(
            tmp_path / "d.parquet", "d.parquet", columns={"prompt": "question", "completion": "id"}
        )


def test_a_column_that_is_nearly_one_of_the_file_is_answered_with_it(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("question,answer\na,b\n", encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"d.csv:2: no column questoin, which columns names. Did you mean question\? It has",
    ):
        read_examples(
            tmp_path / "d.csv", "d.csv", columns={"prompt": "questoin", "completion": "answer"}
        )


CALL = {"name": "f", "arguments": {"x": 1}}


def test_dialects_of_sharegpt_are_the_messages_they_mean(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "1"},
        {"from": "chatgpt", "value": "b", "weight": 1},
        {"from": "user", "value": "c"},
        {"from": "bard", "value": "d", "weight": 0},
    ]
    (example,) = examples_of(
        tmp_path, {"conversations": turns, "system": "s", "tools": json.dumps([CALL])}
    )
    wanted = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": CALL}],
        },
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert list(example.messages) == wanted
    assert example.untrained == {6}
    assert example.tools == ({"type": "function", "function": CALL},)


def test_alpacas_history_input_and_system_are_turns(tmp_path: Path) -> None:
    row = {
        "instruction": "Add.",
        "input": "1 + 1",
        "output": "2",
        "system": "s",
        "history": [["a", "b"]],
    }
    (example,) = examples_of(tmp_path, row)
    assert [(turn["role"], turn["content"]) for turn in example.messages] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "Add.\n1 + 1"), ("assistant", "2"),
    ]  # fmt: skip


@given(
    st.lists(st.text("ab ", max_size=4), max_size=3),
    st.text("ab ", max_size=5),
    st.text("ab ", max_size=5),
)
def test_an_implicit_prompt_is_what_trl_extracts(
    tmp_path_factory: pytest.TempPathFactory, shared: list[str], good: str, bad: str
) -> None:
    turns = [{"role": "user", "content": f"q{text}"} for text in shared]
    pairs: list[tuple[Any, Any]] = [
        (
            [*turns, {"role": "assistant", "content": f"x{good}"}],
            [*turns, {"role": "assistant", "content": f"y{bad}"}],
        ),
        (f"Q: {' '.join(shared)} A:{good}x", f"Q: {' '.join(shared)} A:{bad}y"),
    ]
    for chosen, rejected in pairs[0 if shared else 1 :]:
        theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
        if not theirs["chosen"] or not theirs["rejected"]:
            continue
        (ours,) = examples_of(
            tmp_path_factory.mktemp("p"), {"chosen": chosen, "rejected": rejected}
        )
        if isinstance(chosen, str):
            assert (ours.prompt, ours.completion, ours.rejected) == tuple(
                theirs[key] for key in ("prompt", "chosen", "rejected")
            )
        else:
            assert [*ours.messages] == theirs["prompt"] + theirs["chosen"]
            assert [*(ours.rejected or ())] == theirs["rejected"]


def test_answers_in_a_prompt_are_not_trained_on(tmp_path: Path) -> None:
    turns = question("a", "b", "") + question("c", "d", "")
    (example,) = examples_of(tmp_path, {"prompt": turns[:3], "completion": turns[3:]})
    assert list(example.messages) == turns and example.untrained == {1}


def test_other_keys_are_noted_once_with_the_number_of_rows(tmp_path: Path) -> None:
    notes = list[str]()
    examples_of(
        tmp_path, {"text": "a", "id": 1, "url": "x"}, {"text": "b", "id": 2}, on_note=notes.append
    )
    assert notes == ["d: not used: id (2 rows), url (1 row)"]


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ASKED = {"role": "user", "content": "a"}
DEEP = {"name": "f", "x": json.loads("[" * 299 + "]" * 299)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a"}, PAIR],
            r'd:2: this row is {"prompt", "chosen", "rejected"}, but d:1 is {"text"}. Put them into two',
        ),
        (
            [{"conversations": [{"from": "who", "value": "a"}]}],
            r"d:1: conversations\[0\]: unknown speaker 'who'. Known: human",
        ),
        (
            [{"conversations": [{"from": "gpt", "value": "a"}]}],
            r'd:1: conversations must not start with an "assistant" turn',
        ),
        (
            [{"conversations": [{"value": "a"}]}],
            r'd:1: conversations\[0\] must be {"from": …, "value": …} or',
        ),
        (
            [{"conversations": [{"from": "function_call", "value": "f(1)"}]}],
            r"d:1: conversations\[0\]: a function_call must be",
        ),
        (
            [{"instruction": "a", "output": "b", "inputs": "c"}],
            "d:1: unknown key 'inputs'. Did you mean 'input'",
        ),
        (
            [{"instruction": "a", "output": "b", "history": [["c"]]}],
            r"d:1: history\[0\] must be a pair \[instruction, output\]",
        ),
        ([PAIR | {"chosen": "", "rejected": ""}], "d:1: chosen is empty"),
        (
            [{"chosen": "a b", "rejected": "a b"}],
            "d:1: chosen and rejected do not end in two answers",
        ),
        (
            [{"chosen": "Hi there ", "rejected": "Hi there you"}],
            "d:1: chosen and rejected do not end in two answers",
        ),
        (
            [{"prompt": [ASKED], "chosen": question("a", "b", "")[1:], "rejected": [ASKED]}],
            'd:1: prompt \\+ rejected has no "assistant" turn',
        ),
        (
            [{"chosen": question("a", "b", ""), "rejected": question("a", "b", "")[1:]}],
            'd:1: prompt \\+ rejected must not start with an "assistant" turn',
        ),
        (
            [PAIR | {"chosen": [ASKED]}],
            "d:1: chosen and rejected must be of one kind, got a list and a string",
        ),
        (
            [{"messages": [ASKED | {"train": True}]}],
            r"d:1: messages\[0\]: train is set on a turn of role 'user'. Only",
        ),
        (
            [{"messages": [ASKED | {"weight": 0.5}]}],
            r"d:1: messages\[0\]: weight must be 0 or 1, got 0.5",
        ),
        (
            [{"messages": [ASKED | {"train": "no"}]}],
            r"d:1: messages\[0\]: train must be true or false, got no",
        ),
        (
            [{"messages": [ASKED | {"tool_calls": [CALL]}]}],
            r"d:1: messages\[0\]: tool_calls belong to an assistant turn",
        ),
        (
            [{"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}],
            r'd:1: messages\[0\]: tool_calls\[0\] must be {"type"',
        ),
        ([{"messages": [ASKED], "tools": [1]}], r'd:1: messages has no "assistant" turn'),
        (
            [{"messages": question("a", "b", ""), "tools": [1]}],
            r"d:1: tools\[0\] must be .*, got a number",
        ),
        (
            [{"messages": question("a", "b", ""), "tools": {"a": 1}}],
            r"d:1: tools must be a list, got an object",
        ),
        (
            [{"messages": question("a", "b", ""), "tool": []}],
            r"d:1: unknown key 'tool'. Did you mean 'tools'",
        ),
        (
            [{"messages": question("a", "b", ""), "tools": [DEEP]}],
            "d:1: tools: nested 301 deep, more than 100",
        ),
        (
            [{"prompt": [ASKED], "completion": [ASKED]}],
            'd:1: prompt \\+ completion has no "assistant" turn',
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_row_that_cannot_be_meant_is_one_message(
    tmp_path: Path, rows: Records, message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        examples_of(tmp_path, *rows)
