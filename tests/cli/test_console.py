"""Tables fit the terminal: no word is broken, no number is cut, nothing is lost."""

import re
from collections.abc import Generator, Sequence
from io import StringIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from cli import console
from pipeline.project.runner import Progress

WORD = st.text("abcdefghijklmnopqrstuvwxyzäöü-_/.", min_size=1, max_size=30)
CELL = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
NUMBER = st.integers(0, 10**9).map(lambda number: f"{number:,}")


def drawn(
    width: int,
    columns: list[str],
    rows: list[list[str]],
    right: list[str],
    optional: Sequence[str] = (),
) -> list[str]:
    """The lines of the table on a terminal of this width."""
    plain, before = Console(width=width, color_system=None, highlight=False), console.stdout.width
    console.stdout.width = width
    try:
        with plain.capture() as captured:
            plain.print(console.table(columns, rows, right=right, optional=optional))
    finally:
        console.stdout._width = None if before is None else before
    return captured.get().splitlines()


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]], list[str]]:
    texts, numbers = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    columns = [f"text {n}" for n in range(texts)] + [f"number\n{n}" for n in range(numbers)]
    rows = draw(
        st.lists(st.tuples(*[CELL] * texts, *[NUMBER] * numbers).map(list), min_size=1, max_size=4)
    )
    return columns, rows, columns[texts:]


@given(tables(), st.integers(40, 120))
@example((["a", "b"], [["x" * 30, "12,345"]], ["b"]), 40)
def test_lines_fit_and_every_number_and_short_word_is_there_whole(
    table: tuple[list[str], list[list[str]], list[str]], width: int
) -> None:
    columns, rows, right = table
    lines = drawn(width, *table)
    assert all(len(line.rstrip()) <= width for line in lines)
    words = re.split(r"\s+", " ".join(lines))
    for row in rows:
        for name, cell in zip(columns, row, strict=True):
            for word in cell.split():
                if name in right or len(word) <= 8:
                    assert word in words
                elif word not in words:
                    pieces = [w.split("…") for w in words if "…" in w]
                    assert any(word.startswith(a) and word.endswith(b) for a, b in pieces), (
                        word,
                        lines,
                    )


def test_a_long_name_is_shortened_in_the_middle_and_a_sentence_wraps_between_words() -> None:
    name = "pipeline/some/very/long/path/name-of-something.safetensors"
    lines = drawn(
        60, ["name", "what", "n"], [[name, "a text of several words that wraps", "12,345"]], ["n"]
    )
    assert re.search(r"^pipeline/\S*…\S*safetensors ", lines[1])
    assert "12,345" in lines[1] and "words" in " ".join(lines)


@pytest.mark.parametrize(("width", "parts"), [(100, 1), (80, 1), (60, 2), (40, 3)])
def test_columns_that_do_not_fit_go_on_below_beside_the_rows_names(width: int, parts: int) -> None:
    columns = ["model", *(f"heading\n{n}" for n in range(9))]
    rows = [["base", *["12.345"] * 9], ["expanded", *["6.789"] * 9]]
    lines = drawn(width, columns, rows, columns[1:])
    assert sum(line.startswith("expanded") for line in lines) == parts
    assert sum(line.count("12.345") for line in lines) == 9


def test_optional_columns_are_left_out_in_their_order_before_a_table_goes_on_below() -> None:
    columns, rows = [f"column {n}" for n in range(5)], [[f"{n}" * 10 for n in range(5)]]
    for width, left in (
        (60, "01234"),
        (54, "01234"),
        (53, "0124"),
        (43, "0124"),
        (42, "024"),
        (32, "024"),
        (31, "02"),
    ):
        table = drawn(width, columns, rows, columns, ["column 3", "column 1", "column 4"])
        assert [line.split() for line in table] == [
            [word for n in left for word in ("column", n)],
            [n * 10 for n in left],
        ]


def test_a_line_of_the_result_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is not broken at the terminal's width, and brackets in it are no markup."""
    for stream in (console.stdout, console.stderr):
        monkeypatch.setattr(stream, "_width", 40)
    line = f"report: {'some folder/' * 6}[bold]report.md"
    console.print_line(line)
    console.print_note(line)
    assert tuple(capsys.readouterr()) == (f"{line}\n", f"{line}\n")


def test_lines_of_a_cell_are_shortened_one_by_one() -> None:
    first, second = "a" * 35, "b" * 35
    lines = drawn(40, ["text"], [[f"{first}\n{second} and more"]], [])
    assert [line.strip() for line in lines] == ["text", first, f"{second} and", "more"]


def test_brackets_in_the_progress_of_a_stage_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(console, "stderr", terminal)

    def names() -> Generator[Progress, None, None]:
        yield Progress(0, 1, "lm_head[/a]")

    console.follow(names(), "merge [b]")
    assert isinstance(terminal.file, StringIO)
    shown = terminal.file.getvalue()
    assert "merge [b] " in shown and "lm_head[/a]" in shown


def test_a_heading_that_a_terminal_would_obey_takes_the_room_of_what_is_shown() -> None:
    lines = drawn(40, ["\x1b[31m" + "x" * 20, "n"], [["a", "12,345"]], ["n"])
    assert lines[0].split() == ["␛[31m" + "x" * 20, "n"] and lines[1].split() == ["a", "12,345"]


@pytest.mark.parametrize(
    ("variable", "value"), [("COLUMNS", "0"), ("COLUMNS", "1"), ("COLUMNS", "²"), ("LINES", "0")]
)
def test_a_size_that_no_table_fits_into_is_not_taken(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert variable not in console._terminal_environment()
    monkeypatch.setenv(variable, "40")
    assert console._terminal_environment()[variable] == "40"


def test_the_time_that_is_left_is_shown_also_where_a_step_takes_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    terminal = Console(
        file=StringIO(), force_terminal=True, width=100, color_system=None, get_time=lambda: now[0]
    )
    monkeypatch.setattr(console, "stderr", terminal)

    def slow() -> Generator[Progress, None, None]:
        for step in range(7):
            yield Progress(step, 8, "loss 0.5")
            now[0] += 300

    console.follow(slow(), "train")
    assert isinstance(terminal.file, StringIO)
    assert "6/8 loss 0.5 0:10:00" in terminal.file.getvalue()


def test_a_total_that_is_known_later_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(console, "stderr", terminal)

    def units() -> Generator[Progress, None, None]:
        yield Progress(0, 1, "none runs")
        yield Progress(30, 120, "4 run")

    console.follow(units(), "sweep")
    assert isinstance(terminal.file, StringIO)
    assert "30/120 4 run" in terminal.file.getvalue()
