"""A log is followed correctly however its file is written, truncated or replaced."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.files.file_tail import CHUNK_SIZE, FileTail
from pipeline.project.logs.run_log import (
    COLUMNS,
    Row,
    RunLog,
    Step,
    last_telemetry,
    read_steps,
    step_parser,
)
from pipeline.views.series import Log

HEADER = ",".join(COLUMNS) + "\n"


def line(step: int, loss: float = 1.0) -> str:
    return f"{step},1,{loss},0.001,0.5,{step * 16}\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "loss.csv"
    path.write_text(HEADER + line(1) + line(2), encoding="utf-8")
    return path


def steps(rows: list[Row]) -> list[int]:
    return [int(row[0]) for row in rows]


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_only_what_is_new_is_given(log: Path) -> None:
    tail = FileTail(log, step_parser)
    assert steps(tail.read().rows) == [1, 2]
    assert not tail.changed()
    append(log, line(3))
    assert tail.changed()
    assert steps(tail.read().rows) == [3]


def test_a_half_written_line_is_read_once_it_is_complete(log: Path) -> None:
    tail = FileTail(log, step_parser)
    append(log, "3,1,0.")
    assert steps(tail.read().rows) == [1, 2]
    append(log, "25,0.001,0.5,48\n")
    rows = tail.read().rows
    assert rows == [(3, 1, 0.25, 0.001, 0.5, 48)]
    assert tail.skipped == 0


def test_columns_are_parsed_by_the_header(log: Path) -> None:
    tail = FileTail(log, step_parser)
    assert tail.read().rows == [(1, 1, 1.0, 0.001, 0.5, 16), (2, 1, 1.0, 0.001, 0.5, 32)]
    text = (
        HEADER.strip()
        + ",divergence\n"
        + line(1).strip()
        + ",0.25\n"
        + line(2).strip()
        + ",\n"
        + line(3)
    )
    log.write_text(text, encoding="utf-8")
    rows = tail.read().rows
    assert [row[7] for row in rows[:1]] == [0.25] and all(row[6] is None for row in rows)
    assert [row[7] is None for row in rows] == [False, True, True]
    append(log, line(4).strip() + ",what\n" + line(5).strip() + ",0.5\n")
    assert [row[7] for row in tail.read().rows] == [0.5]
    assert tail.skipped == 1


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 9), st.none() | st.floats(0, 9)), max_size=30),
    st.booleans(),
)
def test_the_columns_match_what_the_run_log_wrote(
    values: list[tuple[float | None, float | None]], held: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with RunLog(Path(folder), 0, 0, evaluated=held, retained=True) as run:
            for number, (eval_loss, divergence) in enumerate(values, 1):
                run.append(Step(number, 1, 1.0, 0.1, 0.2, number, eval_loss, divergence))
        written, log = read_steps(Path(folder) / "loss.csv"), Log(0.9)
        log.extend(FileTail(Path(folder) / "loss.csv", step_parser).read().rows)
    for name in ("eval_loss", "divergence"):
        expected = {
            step.step: value for step in written if (value := getattr(step, name)) is not None
        }
        assert dict(zip(log.series[name].x, log.series[name].y, strict=True)) == expected
    assert list(log.steps) == [step.step for step in written]


def test_a_truncated_log_is_reported_as_restarted(log: Path) -> None:
    tail = FileTail(log, step_parser)
    append(log, line(3))
    tail.read()
    log.write_text(HEADER + line(1), encoding="utf-8")  # in place: the same inode
    chunk = tail.read()
    assert (chunk.change, steps(chunk.rows)) == ("restarted", [1])


def test_a_log_rewritten_to_the_same_length_starts_over(log: Path) -> None:
    tail = FileTail(log, step_parser)
    tail.read()
    log.write_text(HEADER + line(1) + line(2, loss=2.0), encoding="utf-8")
    chunk = tail.read()
    assert chunk.change == "restarted"
    assert [row[2] for row in chunk.rows] == [1.0, 2.0]


def test_a_resumed_run_that_writes_the_same_lines_again_is_no_restart(tmp_path: Path) -> None:
    record = [Step(n, 1, 1.0 / n, 1e-3, 0.5, n) for n in range(1, 7)]
    with RunLog(tmp_path, 0, 0) as log:
        for step in record[:5]:
            log.append(step)
    tail = FileTail(tmp_path / "loss.csv", step_parser)
    seen = tail.read().rows
    telemetry = tmp_path / "telemetry.csv"
    telemetry.write_text(
        telemetry.read_text(encoding="utf-8").replace("\n3,0.0", "\n3,1000.0"), encoding="utf-8"
    )
    with RunLog(tmp_path, 3, 3) as log:  # cut back to step 3, then on
        for step in record[3:]:
            log.append(step)
    chunk = tail.read()
    assert chunk.change == ""
    assert steps(seen + chunk.rows) == [1, 2, 3, 4, 5, 6]
    last = last_telemetry(tmp_path)  # what was trained before counts
    assert (
        last and last.step == 6 and 1000 < last.seconds < 1060 and last.tokens_per_second > 3 / 1000
    )


def test_another_file_at_the_same_path_is_read_from_the_start(log: Path) -> None:
    tail = FileTail(log, step_parser)
    tail.read()
    other = log.with_name("other.csv")
    other.write_text(HEADER + line(7) + line(8) + line(9), encoding="utf-8")
    other.replace(log)
    chunk = tail.read()
    assert (chunk.change, steps(chunk.rows)) == ("replaced", [7, 8, 9])


def test_a_deleted_file_counts_as_empty(log: Path) -> None:
    tail = FileTail(log, step_parser)
    tail.read()
    log.unlink()
    assert tail.changed()
    chunk = tail.read()
    assert (chunk.change, chunk.rows) == ("gone", [])
    assert tail.read().change == ""
    log.write_text(HEADER + line(1), encoding="utf-8")
    assert steps(tail.read().rows) == [1]


def test_a_folder_at_the_path_is_an_empty_file(tmp_path: Path) -> None:
    assert FileTail(tmp_path, step_parser).read().rows == []


def test_foreign_lines_are_counted(log: Path) -> None:
    append(log, "hello\n,,,,,\n\xff\n1,2\n" + line(3))
    tail = FileTail(log, step_parser)
    assert steps(tail.read().rows) == [1, 2, 3]
    assert tail.skipped == 4


def test_a_line_longer_than_a_piece_is_skipped_whole(log: Path) -> None:
    append(log, "9," * 2 * CHUNK_SIZE + "\n" + line(3))
    tail = FileTail(log, step_parser)
    rows, more = [], True
    while more:
        chunk = tail.read()
        rows += steps(chunk.rows)
        more = chunk.more
    assert rows == [1, 2, 3]
    assert tail.skipped == 1


def test_a_long_log_comes_in_pieces(log: Path) -> None:
    append(log, "".join(map(line, range(3, 20_001))))
    tail = FileTail(log, step_parser)
    chunks = [tail.read()]
    while chunks[-1].more:
        chunks.append(tail.read())
    assert len(chunks) == -(-log.stat().st_size // CHUNK_SIZE)
    assert [step for chunk in chunks for step in steps(chunk.rows)] == list(range(1, 20_001))


@given(st.lists(st.integers(1, 60), max_size=12))
def test_however_a_log_is_cut_up_its_rows_are_those_of_read_steps(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cut") / "loss.csv"
    text = HEADER + "".join(map(line, range(1, 9)))
    tail, rows, offset = FileTail(path, step_parser), [], 0
    for cut in [*cuts, len(text)]:
        append(path, text[offset : offset + cut])
        offset += cut
        rows += tail.read().rows
    assert steps(rows) == [step.step for step in read_steps(path)] == list(range(1, 9))


def test_without_a_header_every_line_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.log"
    path.write_text("one\ntwo\nhal", encoding="utf-8")
    tail = FileTail(path, lambda _: str, header=False)
    assert tail.read().rows == ["one", "two"]
    append(path, "f\n")
    assert tail.read().rows == ["half"]


def test_a_reader_far_behind_skips_to_the_latest_lines(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.log"
    path.write_text("".join(f"{number:03}\n" for number in range(100)), encoding="utf-8")
    tail = FileTail(path, lambda _: str, header=False, latest=10)
    assert tail.read().rows == ["... 7", "098", "099"]
    append(path, "100\n")
    assert tail.read().rows == ["100"]
    append(path, "".join(f"{number:03}\n" for number in range(101, 200)))
    chunk = tail.read()
    assert (chunk.change, chunk.rows) == ("", ["... 7", "198", "199"])
    path.write_text("new\n", encoding="utf-8")
    chunk = tail.read()
    assert (chunk.change, chunk.rows) == ("restarted", ["new"])
