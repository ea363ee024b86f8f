"""Containers: the same rows from every kind of file, and one message for each that is broken."""

import gzip
import io
import json
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import FrameType

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.data import containers
from pipeline.data.containers import json_list, lines, read_rows
from pipeline.data.formats import iter_examples, read_examples
from pipeline.errors import UserError
from tests.helpers.containers import TEXT_WRITERS, WRITERS, Records, compressed


def rows_of(path: Path) -> Records:
    return [row.value for row in read_rows(path, path.name) if isinstance(row.value, dict)]


@pytest.mark.parametrize("name", TEXT_WRITERS)
def test_every_container_gives_back_the_texts_that_another_library_wrote(
    tmp_path: Path, name: str
) -> None:
    texts = ["a", ' b,\t"c"; ', "ä\n\n🙂", "007", "[1]", "\u2028|", "null", "x" * 70_000]
    records = [{"prompt": text, "completion": f"{n} {text}"} for n, text in enumerate(texts * 20)]
    TEXT_WRITERS[name](records, tmp_path / name)
    assert rows_of(tmp_path / name) == records


CALLS = [
    {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5], "y": {"z": "ä"}}}}
]
NESTED: Records = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": CALLS},
        ]
    },
    {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
]


@pytest.mark.parametrize("name", WRITERS)
def test_nested_values_come_back_without_the_nulls_that_a_table_adds(
    tmp_path: Path, name: str
) -> None:
    WRITERS[name](NESTED * 8, tmp_path / name)
    assert rows_of(tmp_path / name) == NESTED * 8


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1),
    st.booleans(),
    st.integers(1, 9),
)
@pytest.mark.slow
def test_a_json_list_is_read_as_json_reads_it_wherever_its_pieces_end(
    records: Records, ascii_only: bool, piece: int
) -> None:
    raw = json.dumps(records, ensure_ascii=ascii_only, indent=piece % 2 or None).encode(
        "utf-8", "surrogatepass"
    )
    if b"\xed" in raw:  # perhaps a surrogate
        raw = json.dumps(records).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "CHUNK", piece)
        rows = json_list.json_rows(
            io.BytesIO(b"\xef\xbb\xbf" * (piece % 3 == 0) + raw), "d.json", containers.Reading()
        )
        assert [(row.number, row.value) for row in rows] == list(enumerate(records, 1))


def test_a_long_row_of_a_json_list_is_read_wherever_it_begins(tmp_path: Path) -> None:
    lengths = [30_000, 900_000, *[1000] * 1500]
    records = [{"text": "x" * length} for length in lengths]
    (tmp_path / "d.json").write_text(json.dumps(records), encoding="utf-8")
    assert [row.value for row in read_rows(tmp_path / "d.json", "d.json")] == records


def test_white_space_of_a_text_file_is_kept_also_compressed(tmp_path: Path) -> None:
    texts = ["\tif x:  # doubled", "  a\rb\u2028c\x0bd\x85e ", "f\r"]
    compressed("\n".join(texts), tmp_path / "d.txt.gz")
    assert [row.value for row in read_rows(tmp_path / "d.txt.gz", "d")] == texts


@pytest.mark.parametrize(
    ("name", "raw", "count"),
    [
        ("d.txt", b"\na\n \t\n\nb\n\n", 3),
        ("d.jsonl", b'\n{"text": "a"}\n \n\n{"text": "b"}\n\n', 3),
        ("d.csv", b"text\n\na\n\nb\n", 2),
        ("d.csv", b"\n\ntext\na\nb\n", 2),
    ],
)
def test_blank_lines_are_skipped_and_counted_once(
    tmp_path: Path, name: str, raw: bytes, count: int
) -> None:
    (tmp_path / name).write_bytes(raw)
    notes = list[str]()
    assert [e.text for e in iter_examples(tmp_path / name, name, on_note=notes.append)] == [
        "a",
        "b",
    ]
    assert notes == [f"{name}: {count} blank lines skipped"]


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.csv", "d.txt.gz"])
def test_a_million_blank_lines_are_not_read_one_by_one(tmp_path: Path, name: str) -> None:
    first, last = ('{"text": "a"}', '{"text": "b"}') if name == "d.jsonl" else ("text\na", "b")
    raw = first + "\n" * 1_000_001 + last + "\r\n" * 100_000
    if name.endswith(".gz"):
        compressed(raw, tmp_path / name)
    else:
        (tmp_path / name).write_text(raw, encoding="utf-8")
    # of every function, ours and the library's: what reads or looks at a line calls one
    calls = Counter[str]()

    def count(_frame: FrameType, event: str, _called: object) -> None:
        calls[event] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        rows = [*read_rows(tmp_path / name, name)]
    finally:
        sys.setprofile(before)
    assert rows[-1].number == raw.count("\n", 0, raw.index(last)) + 1
    assert calls["call"] + calls["c_call"] < 20_000, calls


@given(st.text(st.sampled_from("\n\r \ta")), st.integers(1, 9))
def test_lines_that_are_skipped_change_neither_rows_nor_numbers(text: str, size: int) -> None:
    reading = containers.Reading()
    file = io.BufferedReader(io.BytesIO(text.encode()), size)
    rows = [*lines.text_rows(file, "d.txt", reading)]
    filled = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    assert [row.number for row in rows] == [n for n, _ in filled]
    assert reading.blank == (filled[-1][0] - len(filled) if filled else 0)


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html><body>404</body></html>\n", encoding="utf-8")


def truncated(name: str) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"text": [str(random.Random(n).random()) for n in range(5000)]})
    if name.endswith("parquet"):
        parquet.write_table(table, buffer, row_group_size=1000)
        raw = buffer.getvalue()
        return raw[:4] + b"\xff" * 20_000 + raw[20_004:]
    if name.endswith("gz"):
        return gzip.compress(b"\n".join(text.encode() for text in table["text"].to_pylist()))[:-100]
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()[:-5000]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (
            "d.jsonl",
            b"<!DOCTYPE html>\n<html>",
            "d.jsonl:1: this is an HTML page, not data. Download the file itself.",
        ),
        ("d.json", b"\n<html>", "d.json: this is an HTML page"),
        ("d.csv", b"<!doctype html>\na", "d.csv:1: this is an HTML page"),
        ("d.parquet", b"<!DOCTYPE html>", "d.parquet: this is an HTML page"),
        ("d.parquet", b"PAR1 nothing", "d.parquet: not a readable parquet file: "),
        ("d.parquet", truncated("d.parquet"), "d.parquet: not a readable parquet file"),
        ("d.parquet", b"", "d.parquet: not a readable parquet file"),
        ("d.arrow", b"x" * 500, "d.arrow: not a readable arrow file: "),
        ("d.arrow", truncated("d.arrow"), "d.arrow: not a readable arrow file"),
        ("d.feather", b"ARROW1\0\0" + b"x" * 99, "d.feather: not a readable feather file: "),
        (
            "d.txt",
            b"a\n\x89PNG\r\n\x1a\n\0\0",
            r"d.txt:2: not UTF-8 \(byte 2\). Save the file as UTF-8 text.",
        ),
        ("d.txt", b"a\nb\0c\n", "d.txt:2: not a text file: byte 3 is zero"),
        ("d.txt", "größe".encode("utf-16-be"), "d.txt:1: not"),
        ("d.txt.gz", b"no gzip", "d.txt.gz: broken gzip data: "),
        ("d.txt.gz", truncated("d.txt.gz"), "d.txt.gz: broken gzip data: "),
        ("d.txt.zst", b"no zstd", "d.txt.zst: broken zstd data: "),
        (
            "d.json",
            b'{"text": "a"}',
            "d.json: a .json file must hold a list of objects, got one object. Write",
        ),
        (
            "d.json",
            b'[{"text": "a"}',
            "d.json: row 1 must be followed by a comma or ], got the end of the file",
        ),
        (
            "d.json",
            b'[{"text": "a"} {"text": "b"}]',
            "d.json: row 1 must be followed by a comma or ], got '{'",
        ),
        ("d.json", b'[{"text": "a"}, ]', "d.json: row 2: not JSON"),
        ("d.json", b'[{"text": "a"}] x', "d.json: 'x' after the end of the list"),
        ("d.json", b'["a"]', "d.json:1: must be a JSON object, .*, got a string"),
        ("d.json", b"[" * 100_000, "d.json: row 1: not JSON"),
        (
            "d.json",
            b'[{"a": "' + b"x" * 2**21,
            "d.json: row 1: not JSON, or more than 1,048,576 characters",
        ),
        ("d.json", b"[]", "d.json: the file is empty"),
        ("d.json", b"", "d.json: the file is empty"),
        ("d.json", b'[{"text": "a", "text": "b"}]', "d.json: row 1: not JSON: duplicate key"),
        (
            "d.json",
            b'[{"text": "a", "text": "b"}' + b', {"text": ""}' * 2**17 + b"]",
            "d.json: row 1: not JSON: duplicate key",
        ),
        ("d.json", b'[{"text": "\xff"}]', "d.json: not UTF-8"),
        (
            "d.csv",
            b"text,id\na,1\nb\n",
            "d.csv:3: 1 values, but the header has 2 columns. Quote texts that contain ','",
        ),
        ("d.csv", b'text\n"a\nb"\nc,d\n', "d.csv:4: 2 values"),
        ("d.csv", b'text\n"a\nb', "d.csv:2: unexpected end of data. Quote"),
        ("d.csv", b'text\n"a" b\n', "d.csv:2: ',' expected after"),
        (
            "d.csv",
            b'text\n"' + b"a\n" * 2**20,
            r"d.csv:\d+: a row must have at most 1,048,576 characters",
        ),
        (
            "d.csv",
            b"text,text\na,b\n",
            "d.csv:1: the first line must name every column, each name once",
        ),
        ("d.csv", b"text\n", "d.csv: the file is empty"),
        ("d.tsv", b"text\tid\na\n", r"d.tsv:2: 1 values, .* contain '\\t'"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_a_broken_container_is_one_message_with_its_file_and_place(
    tmp_path: Path, name: str, raw: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"^{message}"):
        list(read_rows(path, name))


def test_a_large_json_file_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    with (tmp_path / "d.json").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(
        UserError,
        match=r"d.json: a .json file must have at most 1 GiB. Save it as .jsonl or .parquet",
    ):
        list(read_rows(tmp_path / "d.json", "d.json"))


def test_a_folder_that_is_no_data_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"d: this folder is no data set: it has no state.json. Name a file, or"
    ):
        list(read_rows(tmp_path, "d"))
    (tmp_path / "state.json").write_text(
        '{"_data_files": [{"filename": "../secret.arrow"}]}', encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"d: its state.json names no data files in the folder"):
        list(read_rows(tmp_path, "d"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(
        tmp_path / "e"
    )
    with pytest.raises(
        UserError, match=r"e: a DatasetDict without the split train. It has: test. Name the folder"
    ):
        list(read_rows(tmp_path / "e", "e"))


@pytest.mark.parametrize("name", ["d.json", "d.csv", "d.jsonl.gz", "d.parquet", "d.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    records = [{"prompt": f"{n} " + "wort " * 100, "completion": "ja"} for n in range(8_000)]
    TEXT_WRITERS[name](records, tmp_path / name)
    size = sum(len(record["prompt"]) for record in records)
    del records
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / name, name)) == 8_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 < size / 3


def test_a_hub_data_set_is_read_from_the_cache_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, count in (("train", 3), ("test", 1)):
        records = [{"text": f"{split} {n}"} for n in range(count)]
        (tmp_path / "tiny").mkdir(exist_ok=True)
        WRITERS["d.jsonl"](records, tmp_path / f"tiny/{split}.jsonl")
    datasets.load_dataset(str(tmp_path / "tiny"), cache_dir=str(tmp_path / "cache"))
    # as if it had come from the hub
    (tmp_path / "cache/tiny").rename(tmp_path / "cache/org___tiny")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "cache")
    texts = [(e.text, e.location) for e in read_examples(Path("org/tiny"), "org/tiny")]
    assert texts == [(f"train {n}", f"org/tiny:{n + 1}") for n in range(3)]
    assert [e.text for e in read_examples(Path("org/tiny[test]"), "org/tiny[test]")] == ["test 0"]
    with pytest.raises(
        UserError,
        match=r"^org/tiny\[no\]: no such file, .* Should be one of \['train', 'test'\]\. Check",
    ):
        read_examples(Path("org/tiny[no]"), "org/tiny[no]")
    (tmp_path / "cache/org").mkdir()
    WRITERS["d.jsonl"]([{"text": "mine"}], tmp_path / "cache/org/tiny.jsonl")
    assert read_examples(Path("org/tiny.jsonl"), "org/tiny.jsonl")[0].text == "mine", (
        "a path that exists wins"
    )


def test_a_hub_id_without_network_or_cache_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"^org/none\[test\]: no such file, and it cannot be loaded from the hub: .*\.$",
    ):
        list(read_rows(Path("org/none[test]"), "org/none[test]"))
    with pytest.raises(
        UserError, match=r"^data/x.txt: No such file or directory. Name a file that exists.$"
    ):
        read_examples(Path("data/x.txt"), "data/x.txt")
