"""A data file entered at any row gives what reading it from its beginning gives."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import browse
from pipeline.data.browse import STEP, Entry, RowFile, copied, find
from pipeline.data.containers import MAX_LINE_BYTES, read_rows
from pipeline.data.convert import convert
from pipeline.errors import UserError

COUNT = 3 * STEP + 5


def opened(path: Path) -> RowFile:
    file = RowFile(path, path.name)
    assert [*file.index(lambda: False)][-1] == file.count and file.complete
    return file


@pytest.fixture(params=["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "feather"])
def rows_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source = tmp_path / "source.jsonl"
    source.write_text(
        "".join(f'{{"text": "text number {n} äöü"}}\n' for n in range(COUNT)), encoding="utf-8"
    )
    out = tmp_path / f"rows.{request.param}"
    convert(source, out)
    return out


def test_every_row_is_found_from_everywhere(rows_file: Path) -> None:
    file, rows = opened(rows_file), [*read_rows(rows_file, rows_file.name)]
    assert file.count == len(rows) == COUNT
    for first in (0, COUNT - 1, STEP, 1, 2 * STEP + 7, STEP - 1):
        assert [entry.row for entry in file.read(first, 3)] == rows[first : first + 3], first
    assert file.read(COUNT, 3) == [] and file.read(10 * COUNT, 1) == []
    for position in (0, STEP, COUNT - 1):
        assert file.position_of(rows[position].number) == position
    assert file.position_of(10 * COUNT) is None


def test_a_table_is_entered_within_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [str(n) for n in range(1000)]}), path, row_group_size=300)
    assert [entry.row.value for entry in opened(path).read(650, 2)] == [
        {"text": "650"},
        {"text": "651"},
    ]


def test_blank_lines_have_no_position_but_a_number(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo\n" + b"\n" * 2 * STEP + b"three")
    file = opened(path)
    assert [(e.row.number, e.row.value) for e in file.read(0, 9)] == [
        (1, "one"),
        (4, "two"),
        (2 * STEP + 5, "three"),
    ]
    assert [file.position_of(number) for number in (1, 2, 4, 5, 2 * STEP + 5)] == [0, 1, 1, 2, 2]


def test_a_line_that_cannot_be_read_is_a_row_with_its_problem_and_ends_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        b'{"text": "a"}',
        b"{half",
        b"\xff\xfe",
        b"a\0b",
        b"x" * (3 * MAX_LINE_BYTES),
        b"[1]",
        b'{"text": "z"}',
    ]
    path.write_bytes(b"\n".join(lines))
    entries = opened(path).read(0, 99)
    assert [bool(entry.problem) for entry in entries] == [
        False,
        True,
        True,
        True,
        True,
        True,
        False,
    ]
    assert [entry.row.number for entry in entries] == [1, 2, 3, 4, 5, 6, 7]
    assert entries[1].problem.startswith("not JSON") and entries[1].raw == "{half"
    assert "not UTF-8" in entries[2].problem and "at most" in entries[4].problem
    assert len(entries[4].raw) == browse.LONGEST, "of a long line only its beginning is kept"
    assert entries[6].row.value == {"text": "z"}


def test_what_ends_the_reading_of_other_files_is_their_last_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text\n"a"\nb,c\n"never closed', encoding="utf-8")
    entries = opened(tmp_path / "t.csv").read(0, 9)
    assert [entry.row.number for entry in entries] == [2, 3, 4]
    assert "2 values" in entries[1].problem and entries[2].problem.endswith(
        "Nothing behind it is read."
    )
    (missing,) = opened(tmp_path / "none.jsonl").read(0, 9)
    assert missing.problem.startswith("No such file")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path / "t.parquet")


def test_a_reading_that_is_stopped_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(COUNT))))
    file = opened(path)
    assert file.read(150, 1, lambda: True) == []
    assert [entry.row.number for entry in file.read(150, 1)] == [151]
    assert [entry.row.number for entry in file.read(3, 1)] == [4], "from its beginning again"


def test_an_index_that_was_stopped_counts_from_the_beginning_again(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n' * COUNT, encoding="utf-8")
    file = RowFile(path, path.name)
    assert [*file.index(lambda: file.count > STEP)][-1] < COUNT and not file.complete
    assert [*file.index(lambda: False)][-1] == COUNT
    assert [entry.row.number for entry in file.read(2 * STEP, 1)] == [2 * STEP + 1]


def found(file: RowFile, text: str) -> list[int]:
    return [position for position, entry in find(file, text, lambda: False) if entry]


def test_search_finds_texts_as_they_are_read_whatever_the_case_and_the_escapes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        '{"text": "Der HUND \\"bellt\\""}',
        '{"text": "\\u00c4pfel"}',
        "{broken hund",
        '{"text": "x"}',
        '{"text": "1 \\u003c 2 \\u0026 it\\u0027s"}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    file = opened(path)
    assert found(file, "hund") == [0, 2] and found(file, "äpfel") == [1]
    assert found(file, "x") == [3], "keys are no texts"
    assert found(file, '"bellt"') == [0]
    for text in ("1 < 2", "2 & ", "it's"):  # some writers escape these too
        assert found(file, text) == [4], text


def test_a_copy_has_the_row_changed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    long = b"y" * (2 * MAX_LINE_BYTES)
    path.write_bytes(b'{"text":  "a"}\r\n\n{half\n' + long + b'\n{"text": "z"}')
    copy = b"".join(copied(opened(path), 1, '{"text": "new"}'))
    assert copy == b'{"text":  "a"}\r\n{"text": "new"}\n' + long + b'\n{"text": "z"}\n'
    copy = b"".join(copied(opened(path), 2, '{"text": "new"}'))
    assert copy == b'{"text":  "a"}\r\n{half\n{"text": "new"}\n{"text": "z"}\n'


def test_a_copy_of_another_container_is_jsonl_without_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,completion\na,b\nbad\nc,d\n", encoding="utf-8")
    pieces = [*copied(opened(tmp_path / "t.csv"), 2, '{"prompt": "c", "completion": "new"}')]
    records: list[Any] = [json.loads(piece) if piece else None for piece in pieces]
    assert records == [
        {"prompt": "a", "completion": "b"},
        None,
        {"prompt": "c", "completion": "new"},
    ]
    assert pieces[1] == b"", "a row that is left out"
    (tmp_path / "t.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert [*copied(opened(tmp_path / "t.txt"), 0, '{"text": "1"}')] == [
        b'{"text": "1"}\n',
        b'{"text": "two"}\n',
    ]


def test_a_copy_counts_a_line_of_spaces_that_is_too_long_as_the_row_that_it_is(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.jsonl"
    spaces = b" " * (MAX_LINE_BYTES + 10)
    path.write_bytes(b'{"text": "a"}\n' + spaces + b'\n{"text": "b"}\n{"text": "c"}\n')
    file = opened(path)
    assert file.read(2, 1)[0].row.value == {"text": "b"}
    copy = b"".join(copied(file, 2, '{"text": "new"}'))
    assert copy == b'{"text": "a"}\n' + spaces + b'\n{"text": "new"}\n{"text": "c"}\n'


def test_a_copy_keeps_an_unpaired_surrogate_as_its_escape(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('[{"text": "\\ud800"}, {"text": "b"}]', encoding="utf-8")
    for position in (0, 1):
        line = '{"text": "\ud800"}'
        pieces = [*copied(opened(path), position, line)]
        assert pieces[0] == b'{"text": "\\ud800"}\n'


def test_a_file_that_vanishes_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    file = opened(path)
    path.unlink()
    with pytest.raises(UserError, match=r"t\.txt: No such file"):
        file.read(0, 1)
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert isinstance(file.read(1, 1)[0], Entry)
