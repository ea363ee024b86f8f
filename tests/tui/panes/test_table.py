"""The pane of rows: only what is seen is drawn, and the cursor stays on its row."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, overload

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.containers import Vertical
from textual.content import Content
from textual.strip import Strip

from tests.helpers.panes import HOSTILE, SIZES, mounted, numbers_table
from tui.panes.lines import Lines
from tui.panes.pane import About, Pane
from tui.panes.table import MEASURED, UNSORTED, Column, Table, fitted, sorted_rows


class Person(NamedTuple):
    """A row below a head."""

    name: str
    age: float | None = None
    head: str | None = None


PEOPLE = [
    Person("staff"),
    Person("Ada", 36, "staff"),
    Person("Bob", None, "staff"),
    Person("guests"),
    Person("Cy", 7, "guests"),
]
NAME = Column[Person]("name", lambda person: person.name, lambda person: person.name)
AGE = Column[Person](
    "age", lambda person: str(person.age), lambda person: person.age, largest_first=True
)


def people(folds: bool = False, rows: Sequence[Person] = PEOPLE) -> Table[Person]:
    parent = (lambda person: person.head) if folds else None
    table = Table[Person](key=lambda person: person.name, columns=[NAME, AGE], parent=parent)
    table.show(rows)
    return table


def names(table: Table[Person]) -> list[str]:
    return [text.split()[0] for text in table.texts()]


class Asked(Sequence[str]):
    """Rows that note which of them were asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: set[int] = set()

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self.size))]
        self.asked.add(index)
        return f"row {index}"


# 10,000 rows


async def test_of_10_000_rows_only_those_are_drawn_that_are_seen() -> None:
    drawn = list[int]()

    def cell(row: int) -> str:
        drawn.append(row)
        return f"row {row}"

    table = Table[int](key=lambda row: row, columns=[Column("row", cell, width=9)])
    table.show(range(10_000))
    async with mounted(table, size=(40, 12)) as user:
        assert set(drawn) == set(range(11))
        drawn.clear()
        await user.press("G")
        assert set(drawn) == set(range(9_989, 10_000))
        drawn.clear()
        await user.press("up")
        assert set(drawn) == {9_998, 9_999}


async def test_of_a_lazy_sequence_only_what_is_seen_is_asked_for() -> None:
    rows = Asked(10_000)
    table = Table[str](key=lambda row: row, columns=[Column("row", str, width=9)])
    table.show(rows)
    async with mounted(table, size=(40, 12)) as user:
        assert rows.asked <= set(range(11))
        await user.press("pagedown", "pagedown")
        assert rows.asked <= set(range(40))
        await user.press("end")
        assert rows.asked <= {*range(40), *range(9_980, 10_000)}


async def test_of_rows_shown_anew_only_those_are_drawn_that_look_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, plain = list[int](), Lines.render_line

    def noted(table: Lines, y: int) -> Strip:
        drawn.append(y)
        return plain(table, y)

    monkeypatch.setattr(Lines, "render_line", noted)
    table = people()
    async with mounted(table, size=(40, 12)) as user:
        for rows, changed in {
            (*PEOPLE,): [],
            (*PEOPLE[:2], Person("Bob", 41, "staff"), *PEOPLE[3:]): [3],
            (*PEOPLE, Person("Dee", 9, "guests")): [3, 6],
            (*PEOPLE[:3],): [4, 5, 6],
        }.items():
            drawn.clear()
            table.show(rows)
            await user.settle()
            assert sorted(drawn) == changed
            assert [line.split()[:1] for line in user.lines[1:7] if line.strip()] == [
                [row.name] for row in rows
            ]


async def test_widths_are_those_of_rows_at_both_ends() -> None:
    rows = Asked(10_000)
    table = Table[str](key=lambda row: row, columns=[Column("row", str)])
    table.show(rows)
    async with mounted(table):
        assert rows.asked == {*range(MEASURED), *range(10_000 - MEASURED, 10_000)}
        assert table.texts()[9_999] == "row 9999"


async def test_10_000_rows_are_moved_in_filtered_and_sorted() -> None:
    table = numbers_table(10_000)
    async with mounted(table, size=(40, 12)) as user:
        await user.press("down", "j", "pagedown")
        assert table.pointed == 2 + 10
        assert any(line.split()[:1] == ["12"] for line in user.lines)
        table.filter("999")
        assert len(table.shown) == sum("999" in f"{n}\n{n * n}" for n in range(10_000))
        table.filter("")
        table.sort("square")
        table.sort("square")
        await user.press("g")
        assert table.pointed == 9_999
        await user.press("end")
        assert table.pointed == 0
        assert user.lines[-1].split()[0] == "0"


# The cursor


async def test_the_cursor_stays_on_its_key_when_rows_change_or_are_sorted() -> None:
    table = numbers_table(10)
    async with mounted(table) as user:
        table.point(4)
        table.show([9, 8, 4, 1])
        assert table.pointed == 4 and table.cursor == 2
        table.sort("number")
        assert table.pointed == 4 and table.cursor == 1
        table.show([1, 2])
        assert table.pointed == 2, "its row is gone: it stays on its line, or on the last"
        table.show([])
        assert table.pointed is None
        table.show([5])
        assert table.pointed == 5
        await user.press("down", "up", "end", "home", "pagedown", "enter")
        assert table.pointed == 5


@given(
    st.lists(st.integers(0, 9), unique=True, min_size=1),
    st.lists(st.integers(0, 9), unique=True),
    st.sampled_from([UNSORTED, "number", "square"]),
    st.data(),
)
def test_the_cursor_is_on_its_key_or_on_some_row(
    before: list[int], after: list[int], column: str, data: st.DataObject
) -> None:
    table = numbers_table(0)
    table.show(before)
    pointed = data.draw(st.sampled_from(before))
    assert table.point(pointed)
    table.sort(column)
    assert table.pointed == pointed
    table.show(after)
    assert table.pointed == pointed if pointed in after else table.pointed in [*after, None]
    assert (table.pointed is None) == (not after)


async def test_messages_tell_what_is_pointed_at_opened_and_chosen() -> None:
    table = numbers_table(3)
    async with mounted(table) as user:
        assert [event.row for event in user.messages(Table.Pointed)] == [0]
        await user.press("down", "enter", "space", "up", "up")
        assert [event.row for event in user.messages(Table.Pointed)] == [1, 0]
        assert [event.row for event in user.messages(Table.Opened)] == [1]
        [chosen] = user.messages(Table.Chosen)
        assert chosen.row == 1 and chosen.control is table
        table.show([7])
        await user.settle()
        assert [event.row for event in user.messages(Table.Pointed)] == [7]


async def test_rows_shown_again_do_not_scroll_back_to_the_cursor() -> None:
    table = numbers_table(100)
    async with mounted(table, size=(40, 12)) as user:
        table.scroll_to(y=50, animate=False)
        await user.settle()
        table.show(range(101))
        await user.settle()
        assert table.scroll_offset.y == 50
        await user.press("down")
        assert table.scroll_offset.y == 1, "a key goes to the cursor"


async def test_where_rows_vanish_the_rest_is_seen() -> None:
    table = numbers_table(1_000)
    async with mounted(table, size=(40, 12)) as user:
        await user.press("end")
        table.show(range(20))
        await user.settle()
        assert table.pointed == 19
        assert [line.split()[0] for line in user.lines[1:]] == [str(n) for n in range(9, 20)]
        table.show(range(3))
        await user.settle()
        assert [line.split()[:1] for line in user.lines[1:5]] == [["0"], ["1"], ["2"], []]


def test_pointing_at_a_row_that_is_not_there_is_told() -> None:
    table = numbers_table(3)
    assert not table.point(7) and not table.point(None)
    assert table.pointed == 0


def test_rows_that_are_not_read_yet_are_passed_over() -> None:
    columns = [Column[str]("row", str, str)]
    table = Table[str](key=lambda row: row, columns=columns)
    table.show([None, "b", None, "a"])  # type: ignore[list-item]  # as a lazy sequence has them
    assert table.texts() == ["…", "b", "…", "a"]
    assert table.pointed is None and not table.point(None)
    assert table.point("a") and table.pointed == "a"
    table.show([None] * 4)  # type: ignore[list-item]
    assert table.pointed is None
    table.show(["x"])
    assert table.pointed == "x"
    table.show([None, "b", None, "a"])  # type: ignore[list-item]
    table.sort("row")
    assert table.texts() == ["a", "b"]
    table.filter("b")
    assert table.texts() == ["b"]


# Sort


def test_rows_without_a_value_come_last_in_both_orders() -> None:
    rows = [Person("a", None), Person("b", 1), Person("c", float("nan")), Person("d", 3)]
    for reverse, first in ((False, ["d", "b"]), (True, ["b", "d"])):
        assert [row.name for row in sorted_rows(rows, AGE, reverse)] == [*first, "a", "c"]


@given(st.lists(st.one_of(st.none(), st.floats(), st.integers())), st.booleans(), st.booleans())
def test_sorted_rows_are_all_rows_in_order(
    values: list[float | None], largest_first: bool, reverse: bool
) -> None:
    column = Column[float | None]("value", str, lambda value: value, largest_first=largest_first)
    found = sorted_rows(values, column, reverse)
    known = [value for value in values if value is not None and value == value]
    assert found[: len(known)] == sorted(known, reverse=largest_first != reverse)
    assert len(found) == len(values)


async def test_a_column_is_sorted_by_its_key_its_menu_or_its_title_again_the_other_way() -> None:
    table = people()
    async with mounted(table) as user:
        await user.press("greater_than_sign", "greater_than_sign")
        assert table.sorted_by == "age" and "age ▼" in user.lines[0]
        assert names(table)[:2] == ["Ada", "Cy"]
        await user.press("less_than_sign")
        assert table.sorted_by == "name" and "name ▲" in user.lines[0]
        await user.press("less_than_sign")
        assert table.sorted_by == UNSORTED and table.shown == PEOPLE
        title = user.lines[0].index("age")
        await user.click(table, title, 0)
        assert names(table)[:2] == ["Ada", "Cy"]
        await user.click(table, title, 0)
        assert names(table)[:2] == ["Cy", "Ada"] and "age ▲" in user.lines[0]
        await user.press("s", "up", "enter")
        assert table.sorted_by == "name" and names(table)[0] == "Ada"


async def test_a_column_without_order_is_not_sorted_by_and_s_goes_on_to_the_screen() -> None:
    table = Table[int](key=lambda row: row, columns=[Column("row", str), Column("", str)])
    table.show([2, 1])
    async with mounted(table) as user:
        assert user.lines[0].split() == ["row"]
        await user.click(table, 0, 0)
        await user.press("s", "greater_than_sign")
        assert table.texts() == ["2   2", "1   1"]
        assert len(user.pilot.app.screen_stack) == 1
        assert table.check_action("sort", ()) is False


# Filter


def test_the_filter_keeps_rows_with_all_words_whatever_the_case_and_their_heads() -> None:
    table = people(folds=True)
    table.filter("AD")
    assert names(table) == ["staff", "Ada"]
    table.filter("a 36")
    assert names(table) == ["staff", "Ada"]
    table.filter("guests")
    assert names(table) == ["guests"]
    table.filter("nobody")
    assert names(table) == []
    table.filter("")
    assert len(names(table)) == 5


def test_the_filter_searches_the_words_of_a_row_if_it_has_any() -> None:
    table = Table[Person](
        key=lambda person: person.name, columns=[NAME], words=lambda person: str(person.head)
    )
    table.show(PEOPLE)
    table.filter("guest")
    assert table.texts() == ["Cy"]


def test_the_filter_finds_what_is_folded() -> None:
    table = people(folds=True)
    table.fold("staff", True)
    assert names(table) == ["staff", "guests", "Cy"]
    table.filter("bob")
    assert names(table) == ["staff", "Bob"]


def test_filtered_rows_stay_sorted_without_their_heads() -> None:
    table = people(folds=True)
    table.sort("age")
    assert names(table) == ["Ada", "Cy", "Bob"]
    table.filter("c")
    assert names(table) == ["Cy"]


# Folds


async def test_left_and_right_fold_what_is_below_a_head() -> None:
    table = people(folds=True)
    async with mounted(table) as user:
        table.point("Bob")
        await user.press("left")
        assert names(table) == ["staff", "guests", "Cy"]
        assert table.pointed == PEOPLE[0]
        await user.press("left", "right")
        assert len(names(table)) == 5
        table.fold("guests", True)
        assert table.point("Cy"), "what is folded is unfolded"
        assert table.pointed == PEOPLE[4] and not table.folded


def test_folds_go_by_the_key_when_rows_are_shown_anew() -> None:
    table = people(folds=True)
    table.fold("staff", True)
    table.show([*PEOPLE, Person("Dee", 1, "staff")])
    assert names(table) == ["staff", "guests", "Cy"]


# Columns


def column(title: str, width: int, rank: int = 0, fills: bool = False) -> Column[int]:
    return Column(title, lambda _: title[0] * width, rank=rank, fills=fills)


def titles(table: Table[int]) -> list[str]:
    return [column.title for column in table.columns]


async def test_columns_of_the_highest_rank_are_left_out_first() -> None:
    columns = [column("aa", 10), column("bb", 10, rank=2), column("cc", 10, rank=1)]
    table = Table[int](key=lambda row: row, columns=columns)
    table.show([1])
    async with mounted(table, size=(32, 8)) as user:
        assert titles(table) == ["aa", "bb", "cc"]
        assert not table.show_horizontal_scrollbar, "they fit exactly"
        await user.resize(31, 8)
        assert titles(table) == ["aa", "cc"]
        await user.resize(20, 8)
        assert titles(table) == ["aa"]
        await user.resize(32, 8)
        assert titles(table) == ["aa", "bb", "cc"]


async def test_a_column_that_fills_shrinks_to_what_the_others_leave() -> None:
    columns = [column("long", 50, fills=True), column("num", 5)]
    table = Table[int](key=lambda row: row, columns=columns)
    table.show([1])
    async with mounted(table, size=(30, 8)) as user:
        assert table.texts() == ["l" * 23 + "… nnnnn"]
        await user.resize(80, 8)
        assert table.texts() == ["l" * 50 + " nnnnn"]
        await user.resize(10, 8)
        assert table.texts() == ["l" * 9 + "… nnnnn"], "at least ten cells: the table scrolls"


async def test_columns_of_no_rank_are_kept_and_moved_sideways() -> None:
    table = Table[int](key=lambda row: row, columns=[column("aa", 30), column("bb", 30)])
    table.show([1, 2])
    async with mounted(table, size=(40, 8)) as user:
        assert user.lines[0].split() == ["aa", "bb"]
        assert user.lines[1].startswith("a" * 30)
        await user.press("right", "right")
        assert table.scroll_offset.x == 16
        assert user.lines[1].startswith("a" * 14 + " " + "b" * 24)
        await user.press("left", "left")
        assert table.scroll_offset.x == 0
        await user.resize(80, 8)
        assert table.check_action("sideways", ()) is False, "the keys go on to the screen"


async def test_a_scroll_bar_takes_its_column_from_the_columns() -> None:
    table = Table[int](key=lambda row: row, columns=[column("aa", 10), column("bb", 9, rank=1)])
    table.show([1])
    async with mounted(table, size=(20, 8)) as user:
        assert titles(table) == ["aa", "bb"]
        table.show(range(50))
        await user.settle()
        assert titles(table) == ["aa"]


@given(st.text(), st.integers(0, 30), st.booleans())
def test_a_cell_is_as_wide_as_its_column(text: str, width: int, right: bool) -> None:
    assert cell_len(fitted(Content(text), width, right).plain) == width


# The mouse


async def test_a_click_points_at_a_row_and_a_second_one_opens_it() -> None:
    table = numbers_table(100)
    async with mounted(table, size=(40, 12)) as user:
        await user.click(table, 3, 5)
        assert table.pointed == 4 and not user.messages(Table.Opened)
        await user.click(table, 3, 5)
        assert [event.row for event in user.messages(Table.Opened)] == [4]
        table.scroll_to(y=30, animate=False)
        await user.settle()
        await user.click(table, 3, 1)
        assert table.pointed == 30
        table.show(range(3))
        await user.settle()
        await user.click(table, 3, 9)
        assert table.pointed == 2, "there is no row"


async def test_a_double_click_selects_no_text() -> None:
    table = numbers_table(5)
    async with mounted(table) as user:
        await user.pilot.click(table, offset=(3, 2), times=2)
        await user.settle()
        assert user.pilot.app.screen.get_selected_text() is None
        assert [event.row for event in user.messages(Table.Opened)] == [1]


# What it looks like


async def test_no_rows_are_said_in_a_sentence_that_wraps() -> None:
    nothing = "No runs yet. Press R to start one, and it appears here."
    table = numbers_table(0, nothing=nothing)
    async with mounted(table, size=(30, 8)) as user:
        assert " ".join(" ".join(user.lines).split()) == nothing
        await user.press("enter", "down", "s", "escape")
        assert not user.messages(Table.Opened)
        table.show(range(3))
        await user.settle()
        assert "No runs" not in user.lines[1] and user.lines[1].split() == ["0", "0"]


async def test_hostile_texts_stay_in_their_cells() -> None:
    columns = [
        Column[str]("name", lambda row: row, lambda row: row, width=20),
        Column[str]("bold", lambda row: Content.styled(row, "bold"), width=20),
        Column[str]("end", lambda _: "|"),
    ]
    table = Table[str](key=lambda row: row, columns=columns)
    table.show(HOSTILE)
    async with mounted(table, size=(44, 14)) as user:
        for line in table.texts():
            assert cell_len(line) == 43 and line.endswith("|"), line
        assert table.texts()[0].startswith("[red]not red[/red] …")
        for size in SIZES:
            await user.resize(*size)
            await user.press("down", "end", "home")


async def test_a_cell_of_10_000_characters_is_seen_to_its_end() -> None:
    table = Table[int](key=lambda row: row, columns=[column("x", 10_000)])
    table.show([1])
    async with mounted(table, size=(30, 8)) as user:
        table.scroll_to(x=99_999, animate=False)
        await user.settle()
        assert table.scroll_offset.x == 10_000 - 30
        assert user.lines[1] == "x" * 30


async def test_the_cursor_is_seen_at_every_size() -> None:
    table = numbers_table(1_000)
    async with mounted(table, size=(200, 60)) as user:
        table.point(500)
        for size in SIZES[:2] * 2:
            await user.resize(*size)
            assert any(line.split()[:1] == ["500"] for line in user.lines)


async def test_what_is_shown_while_it_is_hidden_is_there_afterwards() -> None:
    table = numbers_table(3)
    table.display = False
    async with mounted(table) as user:
        table.show(range(500))
        table.point(400)
        table.display = True
        await user.settle()
        assert any(line.split()[:1] == ["400"] for line in user.lines)


@pytest.mark.parametrize("rows", [0, 3, 100])
async def test_a_pane_as_high_as_its_table_shows_all_rows_that_there_is_room_for(rows: int) -> None:
    table = numbers_table(rows, nothing="none")
    table.styles.height, table.styles.max_height = "auto", "100%"
    pane = Pane(About("Numbers"), table)
    pane.styles.height, pane.styles.max_height = "auto", "50%"
    async with mounted(Vertical(pane), size=(40, 20)) as user:
        assert pane.size.height == min(max(rows, 1) + 1, 8)
        table.show(range(4))
        await user.settle()
        assert pane.size.height == 5
        assert [line.split()[1] for line in user.lines[2:6]] == ["0", "1", "2", "3"]


async def test_a_table_as_high_as_its_rows_has_room_for_its_scroll_bar() -> None:
    table = Table[int](key=lambda row: row, columns=[column("aa", 30), column("bb", 30)])
    table.styles.height = "auto"
    async with mounted(Vertical(table), size=(40, 8)) as user:
        table.show([1, 2])
        await user.settle()
        assert [line[:1] for line in user.lines[:3]] == ["a", "a", "a"]
        assert not table.show_vertical_scrollbar


async def test_a_table_is_as_high_as_its_rows_though_a_layout_came_before_it_counted_them() -> None:
    table = numbers_table(0)
    table.styles.height = "auto"
    async with mounted(Vertical(table)) as user:
        table.show(range(2))
        # a layout for another widget, before the table is idle
        user.pilot.app.screen._refresh_layout(user.pilot.app.size)
        await user.settle()
        assert table.size.height == 3


async def test_without_titles_the_first_line_is_a_row() -> None:
    table = numbers_table(3, titles=False)
    async with mounted(table) as user:
        assert user.lines[0].split() == ["0", "0"]
        await user.click(table, 1, 1)
        assert table.pointed == 1


async def test_keys_are_as_their_rows_have_them() -> None:
    keys: list[Hashable] = ["a", ("a", 1), 1, frozenset({1})]
    table = Table[Hashable](key=lambda row: row, columns=[Column("row", str)])
    table.show(keys)
    for key in keys:
        assert table.point(key) and table.pointed == key
