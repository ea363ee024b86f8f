"""Tables of measurements: what is written is what is read, and what is shown says no more than was
measured.
"""

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.tables import Cell, Row, Spread, Table, read_table, shown

from pipeline.errors import UserError

numbers = st.floats(-1e6, 1e6).map(lambda value: float(f"{value:.6g}"))
texts = st.from_regex(r"[a-zäöü ,\"|]*[a-zäöü|]", fullmatch=True).filter(
    lambda t: t not in ("true", "false", "nan", "inf", "infinity")
)
spreads = (
    st.lists(numbers, min_size=1, max_size=4)
    .map(Spread.of)
    .map(lambda s: Spread(*(float(f"{value:.6g}") for value in (s, s.low, s.high))))
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    kinds = draw(
        st.lists(
            st.sampled_from([texts, st.integers(-9_999, 9_999), numbers, spreads, st.booleans()]),
            min_size=1,
            max_size=5,
        )
    )
    rows: list[Row] = draw(
        st.lists(
            st.fixed_dictionaries(
                {f"c{n}": st.one_of(st.none(), kind) for n, kind in enumerate(kinds)}
            ),
            min_size=1,
            max_size=5,
        )
    )
    return Table("t", "", rows)


def same(one: Cell, other: Cell) -> bool:
    # nothing in the file tells a number from a spread
    if isinstance(one, Spread) and isinstance(other, Spread):
        return (one, one.low, one.high) == (other, other.low, other.high)
    return one == other or (one is None and other is None)


@given(tables())
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, table: Table) -> None:
    folder = tmp_path_factory.mktemp("t")
    table.write(folder)
    found = read_table(folder / "t.csv")
    assert all(tuple(row) == table.columns for row in found)
    assert all(
        same(row[name], cell)
        for row, other in zip(table.rows, found, strict=True)
        for name, cell in other.items()
    )


def test_another_library_reads_it_with_three_columns_for_a_spread(tmp_path: Path) -> None:
    Table(
        "t", "", [{"word": "sofa, rot", "p": Spread(0.5, 0.25, 0.75)}, {"word": "bett", "p": None}]
    ).write(tmp_path)
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["word", "p", "p_low", "p_high"],
            ["sofa, rot", "0.5", "0.25", "0.75"],
            ["bett", "", "", ""],
        ]


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=9))
def test_a_spread_is_mean_least_and_greatest(values: list[float]) -> None:
    spread = Spread.of(iter(values))
    assert (spread.low, spread.high) == (min(values), max(values))
    assert math.isclose(spread, math.fsum(values) / len(values), abs_tol=1e-9)


def test_a_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


@pytest.mark.parametrize(
    ("cell", "form", "text"),
    [
        (0.936, ".0%", "94%"),
        (1, ".0%", "100%"),  # a whole number where a share is meant: files do not tell 1 from 1.0
        (Spread(0.94, 0.91, 0.96), ".0%", "94% ±3"),
        (Spread(0.94, 0.9399, 0.9401), ".0%", "94%"),
        (Spread(2.0, 2.0, 2.0), ".1f", "2.0"),
        (112_768, "", "112,768"),
        (0.123456, "", "0.1235"),
        (True, "", "yes"),
        (None, ".0%", "–"),
        ("", "", "–"),
        ("sofa", ".0%", "sofa"),
    ],
)
def test_cells_are_shown(cell: Cell, form: str, text: str) -> None:
    assert shown(cell, form) == text


def test_hidden_columns_are_in_the_file_alone(tmp_path: Path) -> None:
    table = Table(
        "t", "", [{"model": "a", "kind_of": "x", "loss": 1.5}], {"loss": ".2f"}, ("kind_of",)
    )
    table.write(tmp_path)
    assert table.heads == {"model": False, "loss": True}
    assert table.markdown() == "| model | loss |\n| --- | ---: |\n| a | 1.50 |\n"
    assert list(read_table(tmp_path / "t.csv")[0]) == ["model", "kind_of", "loss"]


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe"])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "t.csv"
    if isinstance(content, bytes):
        path.write_bytes(content)
    if content == "":
        path.write_text("", encoding="utf-8")
        assert read_table(path) == []
        return
    with pytest.raises(UserError, match=r"t\.csv.*(Run its study|`dvc repro`)"):
        read_table(path)
