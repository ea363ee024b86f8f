"""The frame: its title, its keys, its help, and the field that filters."""

import pytest
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, Static

from tests.helpers.panes import HOSTILE, SIZES, Panes, mounted, numbers_table
from tui.panes.pane import About, FilterField, Pane
from tui.panes.table import Table
from tui.panes.text import Text

KEYS = [
    Binding("c", "app.bell", "Chat", id="numbers.chat"),
    Binding("ctrl+e", "app.beep", "Evaluate", id="numbers.evaluate"),
    Binding("h", "app.hidden", "Hidden", show=False),
]
NUMBERS = About("Numbers", "All **numbers**.", KEYS, filters="filter")


def numbers(about: About = NUMBERS, count: int = 30) -> tuple[Pane, Table[int]]:
    table = numbers_table(count)
    return Pane(about, table, id="numbers"), table


async def type_filter(user: Panes, pane: Pane, text: str) -> FilterField:
    field = pane.filter_field
    assert field is not None
    pane.open_filter()
    await user.press(*text)
    return field


# Title and keys


async def test_the_title_has_facts_and_the_filter() -> None:
    pane, _ = numbers()
    async with mounted(pane) as user:
        assert pane.border_title == "Numbers"
        pane.show_title("3 of 9", "[red]x")
        assert "─ Numbers  3 of 9  [red]x ─" in user.lines[0]
        await type_filter(user, pane, "29")
        assert "─ Numbers  3 of 9  [red]x  /29 ─" in user.lines[0]
        pane.show_title(title="Squares")
        await user.settle()
        assert "─ Squares  /29 ─" in user.lines[0]
        pane.close_filter()
        await user.settle()
        assert "─ Squares ─" in user.lines[0]


async def test_a_title_set_before_it_is_mounted_is_shown() -> None:
    pane, _ = numbers()
    pane.show_title("a fact")
    async with mounted(pane) as user:
        assert "─ Numbers  a fact ─" in user.lines[0]


@pytest.mark.parametrize("text", HOSTILE)
async def test_titles_of_any_characters_leave_the_frame_whole(text: str) -> None:
    pane, _ = numbers(About(text, text, filters=text[:9]))
    async with mounted(pane, size=(40, 6)) as user:
        pane.show_title(text, title=text)
        for size in SIZES:
            await user.resize(*size)


@pytest.mark.parametrize(
    ("width", "keys"),
    [
        (60, "c chat  ^e evaluate  / filter"),
        (33, "c chat  ^e evaluate"),
        (20, "c chat"),
        (8, ""),
    ],
)
async def test_the_border_has_as_many_keys_as_fit_whole(width: int, keys: str) -> None:
    pane, _ = numbers()
    async with mounted(pane, size=(width, 8)) as user:
        assert (
            Content.from_markup(pane.border_subtitle or "").plain == keys and keys in user.lines[-1]
        )
        known = {"app.bell": "chat", "app.beep": "evaluate", "filter": "filter"}
        assert pane.actions_in_border == {action for action in known if known[action] in keys}
        await user.resize(60, 8)
        assert "/ filter" in user.lines[-1]


async def test_keys_of_a_pane_work_where_the_focus_is_in_it() -> None:
    pane, table = numbers()
    async with mounted(pane) as user:
        user.pilot.app.screen.set_focus(table)
        bindings = user.pilot.app.screen.active_bindings
        assert bindings["c"].node is pane and bindings["h"].binding.action == "app.hidden"


def test_help_and_keys_are_those_of_what_it_is_about() -> None:
    pane, _ = numbers()
    assert pane.about.help == "All **numbers**."
    assert Pane(About("Plain")).filter_field is None


# Filter


async def test_the_filter_narrows_as_one_types_and_enter_keeps_it() -> None:
    pane, table = numbers()
    async with mounted(pane) as user:
        user.pilot.app.screen.set_focus(table)
        table.point(5)
        field = await type_filter(user, pane, "29")
        assert field.has_focus and table.shown == [23, 27, 29]
        await user.press("enter")
        assert table.has_focus and field.display and pane.filter_text == "29"
        assert table.shown == [23, 27, 29]


async def test_ending_the_filter_shows_all_again_and_gives_the_focus_back() -> None:
    pane, table = numbers()
    before = Input()
    async with mounted(before, pane) as user:
        assert before.has_focus
        field = await type_filter(user, pane, "29")
        pane.close_filter()
        await user.settle()
        assert before.has_focus and not field.display and len(table.shown) == 30


async def test_a_filter_left_empty_is_closed() -> None:
    pane, table = numbers()
    async with mounted(pane) as user:
        user.pilot.app.screen.set_focus(table)
        field = await type_filter(user, pane, "2")
        await user.press("backspace", "enter")
        assert not field.display and table.has_focus and len(table.shown) == 30


async def test_keys_typed_at_once_are_meant_for_the_field() -> None:
    pane, table = numbers()
    async with mounted(pane) as user:
        user.pilot.app.screen.set_focus(table)
        pane.open_filter()
        assert user.pilot.app.focused is pane.filter_field
        pane.open_filter()
        await user.press("escape", "enter")
        assert table.has_focus, "opened twice it still knows where the focus was"


async def test_where_the_focus_was_removed_it_goes_to_the_pane() -> None:
    pane, table = numbers()
    before = Input()
    async with mounted(before, pane) as user:
        await type_filter(user, pane, "2")
        await before.remove()
        await user.press("enter")
        assert table.has_focus


async def test_a_text_is_searched() -> None:
    text = Text("\n".join(f"line {n}" for n in range(50)))
    pane = Pane(About("Log", filters="search"), text)
    async with mounted(pane) as user:
        await type_filter(user, pane, "line 4")
        assert text.found == 4 and "/ search" in user.lines[-1]
        await user.press("enter", "n")
        assert text.found == 40


async def test_a_pane_that_cannot_filter_by_itself_tells_what_it_is_narrowed_to() -> None:
    pane = Pane(About("Cards", filters="filter"), Vertical(Static("one")))
    async with mounted(pane) as user:
        await type_filter(user, pane, "ab")
        found = user.messages(Pane.Filtered)
        assert [event.text for event in found] == ["a", "ab"] and found[0].control is pane


async def test_without_a_filter_nothing_is_opened() -> None:
    pane, table = numbers(About("Numbers"))
    async with mounted(pane) as user:
        user.pilot.app.screen.set_focus(table)
        pane.open_filter()
        pane.close_filter()
        await user.settle()
        assert table.has_focus and pane.filter_text == ""


async def test_the_focus_of_a_pane_is_its_first_widget_that_can_have_it() -> None:
    table = numbers_table(3)
    pane = Pane(NUMBERS, Static("words"), table)
    async with mounted(pane):
        assert pane.first_focus() is table
        table.disabled = True
        assert pane.first_focus() is None
