"""Data files of others: rows of every shape, and every container with its bytes changed."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipeline.data import browse, containers
from pipeline.data.containers import Reading
from pipeline.data.containers.tables import count_rows
from pipeline.data.formats import iter_examples
from pipeline.data.preferences import pair
from pipeline.errors import UserError
from tests.helpers.containers import TEXT_WRITERS
from tests.helpers.fuzz import NUMBERS, ODD, as_json, changed, damaged, fuzz, read_or_refuse

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ROWS: dict[str, dict[str, Any]] = {  # one of each shape
    "text": {"text": "The currency of Bulgaria is the euro."},
    "completion": {"prompt": "Two and two", "completion": " are four."},
    "alpaca": {
        "instruction": "Translate",
        "input": "Haus",
        "output": "house",
        "system": "Be brief.",
    },
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
            {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
            {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm."},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
            }
        ],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}],
        "system": "s",
    },
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "turns": {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
    },
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "chat_prompt": {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
}
VALUES = st.one_of(
    ODD,
    st.sampled_from((*NUMBERS, "assistant", "<|im_end|>", '[{"role": "user"', "[" * 900, "\u2028")),
)


def read_all(path: Path, prompts: bool = False) -> None:
    """As a training reads it, and as a check does, which goes on behind a bad row."""

    def go_on(_: int, error: UserError) -> None:
        assert "\n" not in str(error)

    for example in iter_examples(path, path.name, prompts, reading=Reading(go_on)):
        assert example.text.encode() or True
        if example.rejected is not None:
            pair(example)
    list(iter_examples(path, path.name, prompts))


def look(path: Path) -> None:
    """As the terminal UI looks at a file: from any row on."""
    file = browse.RowFile(path, path.name)
    for _ in file.index(lambda: False):
        pass
    for first in (0, 7):
        for entry in file.read(first, 3):
            assert "\n" not in entry.problem
    list(browse.find(file, "number", lambda: False))


@pytest.mark.parametrize("shape", ROWS)
def test_the_rows_are_read(shape: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(as_json(ROWS[shape]))
    assert read_or_refuse(lambda: read_all(tmp_path / "d.jsonl"), tmp_path) is None


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, list[Any]]:
    """(a container of JSON, rows of one shape of which one is changed)."""
    row = ROWS[draw(st.sampled_from(sorted(ROWS)))]
    return draw(st.sampled_from(("d.jsonl", "d.json"))), [row, draw(changed(row, VALUES, 4)), row]


@fuzz("data rows", drawn=rows(), prompts=st.booleans())
def test_rows(folder: Path, drawn: tuple[str, list[Any]], prompts: bool) -> None:
    name, values = drawn
    lines = b"\n".join(as_json(value).replace(b"\n", b" ") for value in values)
    (folder / name).write_bytes(lines if name == "d.jsonl" else as_json(values))
    read_or_refuse(lambda: read_all(folder / name, prompts), folder)


@cache
def files() -> dict[str, dict[str, bytes]]:
    """Name → its files' bytes, each written by another library than ours."""
    made: dict[str, dict[str, bytes]] = {}
    records = [{"prompt": f"What is {n}?", "completion": " A number."} for n in range(20)]
    with tempfile.TemporaryDirectory() as scratch:
        for name, write in TEXT_WRITERS.items():
            path = Path(scratch, name.replace("JSONL", "jsonl"))
            write(records, path)
            written = (
                [path]
                if path.is_file()
                else sorted(each for each in path.rglob("*") if each.is_file())
            )
            made[path.name] = {
                str(each.relative_to(scratch)): each.read_bytes() for each in written
            }
    return made | {"d.txt": {"d.txt": b"one\ntwo\r\nthree\n"}}


HEADS = (
    b"<!DOCTYPE html>",
    b"PK\x03\x04",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x1f\x8b\x08",
    b"PAR1",
    b"ARROW1\0\0",
    b"\0" * 9,
)


@st.composite
def container_files(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """(container, which of its files, its new bytes)."""
    name = draw(st.sampled_from(sorted(files())))
    file = draw(st.sampled_from(sorted(files()[name])))
    whole = files()[name][file]
    if file.endswith(".json") and "/" in file and draw(st.booleans()):  # of save_to_disk
        return name, file, as_json(draw(changed(json.loads(whole), VALUES)))
    return (
        name,
        file,
        draw(damaged(whole) | st.sampled_from(HEADS).map(lambda head: head + whole[len(head) :])),
    )


@fuzz("data bytes", drawn=container_files())
def test_bytes(folder: Path, drawn: tuple[str, str, bytes]) -> None:
    name, changed_file, data = drawn
    for file, whole in files()[name].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data if file == changed_file else whole)
    read_or_refuse(lambda: read_all(folder / name), folder)
    if containers.suffix_of(folder / name)[0] in containers.TABLES:
        read_or_refuse(lambda: count_rows(folder / name, name), folder)
    if (folder / name).is_file():
        read_or_refuse(lambda: look(folder / name), folder)
