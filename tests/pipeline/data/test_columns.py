"""Columns of files of others: nested keys, keys of turns, roles."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.columns import columns_option, rename
from pipeline.data.containers import Reading
from pipeline.data.examples import Example
from pipeline.errors import UserError
from tests.helpers.errors import user_error
from tests.helpers.examples import examples_of

TURNS = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "On its way."},
]
SPOKEN = [
    {"speaker": "Customer", "text": "Where is it?"},
    {"speaker": "agent", "text": "On its way."},
]
OF_TURNS = {"role": "speaker", "content": "text", "user": "customer|client", "assistant": "agent"}


def example_of(
    folder: Path, record: dict[str, Any], columns: dict[str, str], reading: Reading | None = None
) -> Example:
    (example,) = examples_of(folder, record, columns=columns, reading=reading)
    return example


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"dialog": SPOKEN}, {"messages": "dialog", **OF_TURNS}),
        ({"data": {"dialog": SPOKEN}}, {"messages": "data.dialog", **OF_TURNS}),
        ({"messages": SPOKEN}, OF_TURNS),
        ({"dialog": json.dumps(SPOKEN)}, {"messages": "dialog", **OF_TURNS}),
        (
            {
                "dialog": [
                    {"by": {"name": "customer"}, "said": "Where is it?"},
                    {"by": {"name": "agent"}, "said": "On its way."},
                ]
            },
            {
                "messages": "dialog",
                "role": "by.name",
                "content": "said",
                "user": "customer",
                "assistant": "agent",
            },
        ),
    ],
)
def test_turns_are_read_by_the_names_that_the_file_has_for_their_keys_and_roles(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str]
) -> None:
    assert example_of(tmp_path, record, columns) == example_of(tmp_path, {"messages": TURNS}, {})


def test_sharegpts_turns_and_those_of_a_prompt_have_names_too(tmp_path: Path) -> None:
    columns = {
        "conversations": "talk",
        "from": "speaker",
        "value": "text",
        "user": "customer",
        "assistant": "agent",
    }
    assert example_of(tmp_path, {"talk": SPOKEN}, columns) == example_of(
        tmp_path, {"messages": TURNS}, {}
    )
    split = {"asked": SPOKEN[:1], "said": SPOKEN[1:]}
    chat = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    assert example_of(
        tmp_path, split, {"prompt": "asked", "completion": "said", **OF_TURNS}
    ) == example_of(tmp_path, chat, {})


def test_a_path_leads_to_a_nested_value_and_a_key_with_a_dot_comes_first(tmp_path: Path) -> None:
    record = {"question": {"text": "Where?"}, "answers": {"text": ["Here", "There"]}}
    example = example_of(
        tmp_path, record, {"prompt": "question.text", "completion": "answers.text.1"}
    )
    assert (example.prompt, example.completion) == ("Where?", "There")
    dotted = {"q.text": "Where?", "q": {"text": "Who?"}, "a": "Here"}
    assert example_of(tmp_path, dotted, {"prompt": "q.text", "completion": "a"}).prompt == "Where?"
    with pytest.raises(UserError, match=r"no column answers\.text\.7, which columns names"):
        example_of(tmp_path, record, {"prompt": "question.text", "completion": "answers.text.7"})


def test_what_else_a_turn_has_is_left_out_and_counted_where_its_keys_are_named(
    tmp_path: Path,
) -> None:
    reading = Reading()
    timed = [{**turn, "at": 1} for turn in SPOKEN]
    example = example_of(tmp_path, {"dialog": timed}, {"messages": "dialog", **OF_TURNS}, reading)
    assert example == example_of(tmp_path, {"messages": TURNS}, {}) and reading.unused == {
        "messages.at": 1
    }
    with pytest.raises(UserError, match="unknown key 'at'"):
        example_of(tmp_path, {"messages": [{**turn, "at": 1} for turn in TURNS]}, {})


def test_system_is_alpacas_key_unless_turns_are_named(tmp_path: Path) -> None:
    alpaca = {"instruction": "a", "output": "b", "rules": "Be kind"}
    assert example_of(tmp_path, alpaca, {"system": "rules"}).messages[0] == {
        "role": "system",
        "content": "Be kind",
    }
    told = [{"speaker": "rules", "text": "Be kind"}, *SPOKEN]
    example = example_of(
        tmp_path, {"dialog": told}, {"messages": "dialog", **OF_TURNS, "system": "rules"}
    )
    assert example.messages[0] == {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        (
            {"question": "a", "completion": "b"},
            {"question": "prompt"},
            "second: prompt=question. It has",
        ),
        ({"question": "a", "answer": "b"}, {"prompt": "qestion"}, "Did you mean question?"),
        ({"messages": SPOKEN}, {}, "in columns, such as --columns role=speaker,content=text."),
        (
            {"messages": SPOKEN},
            {"role": "speaker", "content": "text"},
            "such as --columns user=Customer.",
        ),
    ],
)
def test_a_wrong_name_is_an_error_that_says_the_right_one(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    assert message in user_error(example_of, tmp_path, record, columns)


def test_a_text_that_looks_like_a_list_stays_a_text() -> None:
    record = {"prompt": "[1, 2]", "completion": "[not JSON"}
    assert rename(record, OF_TURNS, "d:1", True) == (record, set())


def test_the_option_is_written_as_a_shell_takes_it() -> None:
    assert columns_option({}) == ""
    assert columns_option({"prompt": "q", "user": "a|b"}) == " --columns 'prompt=q,user=a|b'"
