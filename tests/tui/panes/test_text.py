"""The pane of a text: laid out for its width, searched, followed, copied."""

import asyncio
import threading
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.content import Content
from textual.events import MouseScrollUp
from textual.geometry import Offset
from textual.selection import SELECT_ALL, Selection

from tests.helpers.panes import HOSTILE, SIZES, mounted
from tests.helpers.pilot import until
from tui.panes.lines import wrapped
from tui.panes.markdown import markdown
from tui.panes.text import Text

WORDS = "one two three four five six seven eight nine ten"
MANY = "\n".join(f"line {number}" for number in range(100))


class Drawn:
    """Draws as many lines, and notes for which widths it was asked."""

    def __init__(self, count: int = 3) -> None:
        self.count = count
        self.widths = list[int]()

    def __call__(self, width: int) -> Iterator[Content]:
        self.widths.append(width)
        return (Content(f"{number} of {width} cells") for number in range(self.count))


def top(text: Text) -> int:
    return round(text.scroll_offset.y)


# Layout


async def test_lines_wrap_at_the_width_and_again_when_it_changes() -> None:
    text = Text(WORDS)
    async with mounted(text, size=(20, 8)) as user:
        assert [line.rstrip() for line in user.lines[:3]] == [
            "one two three four",
            "five six seven eight",
            "nine ten",
        ]
        await user.resize(60, 8)
        assert user.lines[0].rstrip() == WORDS
        await user.resize(20, 8)
        assert text.line_count == 3


async def test_what_is_drawn_for_the_width_is_drawn_again_for_another_and_not_for_a_height() -> (
    None
):
    text, draw = Text(), Drawn()
    async with mounted(text, size=(30, 8)) as user:
        text.show(draw)
        await user.resize(30, 10)
        assert draw.widths == [30] and text.plain.splitlines()[0] == "0 of 30 cells"
        await user.resize(40, 10)
        assert draw.widths == [30, 40] and text.plain.splitlines()[0] == "0 of 40 cells"


async def test_a_scroll_bar_covers_no_text() -> None:
    text = Text("x" * 200)
    async with mounted(text, size=(20, 4)) as user:
        assert text.show_vertical_scrollbar and not text.show_horizontal_scrollbar
        assert text.plain.splitlines()[0] == "x" * 19
        text.show("x" * 60)
        await user.settle()
        assert not text.show_vertical_scrollbar
        text.show("x" * 60)
        await user.settle()
        assert [line.rstrip() for line in user.lines[:3]] == ["x" * 20] * 3


async def test_a_wide_text_is_not_wrapped_and_moved_sideways() -> None:
    text = Text("x" * 30 + "end", wide=True)
    async with mounted(text, size=(20, 4)) as user:
        assert text.line_count == 1
        await user.press("right", "right")
        text.scroll_to(x=99, animate=False)
        await user.settle()
        assert user.lines[0].rstrip().endswith("end")


@given(st.text(), st.integers(2, 30))
def test_wrapped_lines_fit_and_lose_no_word(text: str, width: int) -> None:
    line = Content(text.replace("\n", " "))
    parts = wrapped(line, width)
    assert all(cell_len(part.plain) <= width for part in parts)
    assert "".join("".join(part.plain.split()) for part in parts) == "".join(line.plain.split())


async def test_a_text_of_100_000_lines_is_drawn_where_it_is_seen() -> None:
    seen = list[int]()

    class Noted(Text):
        def line(self, number: int) -> Content:
            seen.append(number)
            return super().line(number)

    text = Noted("\n".join(f"line {number}" for number in range(100_000)))
    async with mounted(text, size=(40, 12)) as user:
        assert set(seen) == set(range(12))
        seen.clear()
        await user.press("G")
        assert set(seen) == set(range(99_988, 100_000))
        assert user.lines[-1].strip().startswith("line 99999")


async def test_what_is_shown_while_it_is_hidden_is_there_afterwards() -> None:
    text = Text("before")
    async with mounted(text) as user:
        text.display = False
        await user.settle()
        text.show("after")
        text.display = True
        await user.settle()
        assert user.lines[0].rstrip() == "after"


async def test_a_new_text_begins_at_its_top_and_the_same_again_stays_where_it_is() -> None:
    text = Text(MANY)
    async with mounted(text) as user:
        await user.press("pagedown")
        here = top(text)
        assert here > 0
        text.show(f"{MANY}\nmore", again=True)
        await user.settle()
        assert top(text) == here
        text.show(MANY)
        await user.settle()
        assert top(text) == 0


async def test_a_text_that_became_shorter_is_seen() -> None:
    text = Text(MANY)
    async with mounted(text) as user:
        await user.press("end")
        text.show("short", again=True)
        await user.settle()
        assert user.lines[0].rstrip() == "short"


async def test_nothing_is_shown_as_nothing() -> None:
    text = Text()
    async with mounted(text) as user:
        await user.press("down", "G", "g", "n", "N", "pageup")
        text.filter("x")
        assert text.plain == "" and text.line_count == 0 and not "".join(user.lines).strip()


# In a thread


async def test_a_slow_text_is_laid_out_in_a_thread_and_only_the_last_is_shown() -> None:
    threads, go_on = list[int](), threading.Event()

    def slow(_: int) -> Iterator[Content]:
        threads.append(threading.get_ident())
        go_on.wait(10)
        yield Content("slow")

    text = Text()
    async with mounted(text) as user:
        text.show(slow, slowly=True)
        while not threads:
            await asyncio.sleep(0.01)
        text.show(lambda _: [Content("quick")], slowly=True)
        while text.plain != "quick":
            await asyncio.sleep(0.01)
        go_on.set()
        await user.settle()
        assert text.plain == "quick"
        assert threads and threading.get_ident() not in threads


async def test_a_slow_text_follows_the_width() -> None:
    text, draw = Text(), Drawn(50)
    async with mounted(text, size=(30, 8)) as user:
        text.show(draw, slowly=True)
        await until(user.pilot, lambda: text.plain.startswith("0 of 29"))
        await user.resize(50, 8)
        await until(user.pilot, lambda: text.plain.startswith("0 of 49"))


async def test_markdown_is_laid_out_in_a_thread_searched_and_moved_in() -> None:
    table = f"| a | b |\n|---|---|\n| {'x' * 100} | y |\n"
    page = "\n\n".join(f"line {n}" for n in range(100)) + f"\n\n{table}"
    text = Text(wide=True)
    async with mounted(text, size=(60, 10)) as user:
        text.show(markdown(page, user.pilot.app.theme_variables), slowly=True)
        await until(user.pilot, lambda: "line 99" in text.plain)
        text.filter("LINE 5")
        assert len(text.matches) == 11
        await user.press("n")
        assert text.plain.splitlines()[text.found].strip() == "line 50"
        await user.press("G", "right", "g")
        assert text.virtual_size.width > 100
        await user.resize(90, 12)
        await until(user.pilot, lambda: "line 99" in text.plain)


# Search


async def test_a_search_goes_to_the_first_match_and_n_to_the_next_and_around() -> None:
    text = Text(MANY)
    async with mounted(text) as user:
        text.filter("LINE 3")
        assert text.matches == [3, *range(30, 40)] and text.found == 3
        await user.press("n")
        assert text.found == 30 and top(text) <= 30 < top(text) + text.page_height
        await user.press("N", "N")
        assert text.found == 39, "before the first comes the last"
        await user.press("n")
        assert text.found == 3
        text.filter("nowhere")
        assert text.matches == [] and text.found == -1
        await user.press("n", "N")
        text.filter("")
        assert text.check_action("match", (1,)) is False, "n goes on to the screen"


async def test_a_search_begins_where_one_reads() -> None:
    text = Text(MANY)
    async with mounted(text) as user:
        text.scroll_to(y=35, animate=False)
        await user.settle()
        text.filter("line")
        assert text.found == 35


async def test_what_is_found_is_marked_in_its_line() -> None:
    text = Text("a cat, a Cat\nSTRASSE straße cat")
    async with mounted(text):
        text.filter("cat")
        assert [span.start for span in text.line(0).spans] == [2, 9]
        assert "$warning" in str(text.line(0).spans[0].style)
        assert text.matches == [0, 1], "where folding the case changes the length nothing is marked"
        assert not text.line(1).spans


# Follow


async def test_the_last_lines_are_followed_until_one_scrolls_up() -> None:
    text = Text(follow=True)
    async with mounted(text) as user:
        lines = MANY
        for more in range(3):
            lines += f"\nmore {more}"
            text.show(lines, again=True)
            await user.settle()
            assert user.lines[-1].split()[:2] == ["more", str(more)]
        await user.press("up")
        here = top(text)
        text.show(f"{lines}\nnot seen", again=True)
        await user.settle()
        assert top(text) == here and not text.follows
        await user.press("G")
        assert text.follows and "not seen" in user.lines[-1]


async def test_scrolling_up_in_any_way_ends_to_follow() -> None:
    text = Text(follow=True)
    async with mounted(text) as user:
        text.show(MANY)
        for key in ("up", "k", "pageup", "home", "g"):
            await user.press("G")
            assert text.follows
            await user.press(key)
            assert not text.follows, key
        await user.press("G", "down", "pagedown")
        assert text.follows
        await user.pilot._post_mouse_events([MouseScrollUp], widget=text)
        await user.settle()
        assert not text.follows
        await user.press("G")
        await user.click(text.vertical_scrollbar, 0, 0)
        assert not text.follows, "a click above the handle of the scroll bar"


async def test_lines_under_way_do_not_scroll_down_who_scrolled_up() -> None:
    text = Text(follow=True)
    async with mounted(text) as user:
        text.show(MANY)
        await user.settle()
        text.show(f"{MANY}\nmore", again=True)
        text.action_first()
        await user.settle()
        assert top(text) == 0


async def test_a_search_in_a_log_goes_to_the_last_match_and_ends_to_follow() -> None:
    text = Text(follow=True)
    async with mounted(text) as user:
        text.show(MANY)
        await user.settle()
        text.filter("line 1")
        assert text.found == 19 and not text.follows
        text.show("another log")
        assert text.follows, "another text is followed again"


# Copy


def test_a_copy_is_the_selected_part_and_draws_no_other_line() -> None:
    drawn = list[int]()

    class Noted(Text):
        def line(self, number: int) -> Content:
            drawn.append(number)
            return Content(f"line {number}")

    text = Noted()
    text.set_size(10, 1_000_000)
    part = Selection(Offset(5, 500_000), Offset(4, 500_002))
    assert text.get_selection(part) == ("500000\nline 500001\nline", "\n")
    assert drawn == [500_000, 500_001, 500_002]
    assert text.get_selection(Selection(Offset(2, 3), Offset(4, 3))) == ("ne", "\n")
    assert text.get_selection(Selection(Offset(0, 999_999), None)) == ("line 999999", "\n")


async def test_text_is_selected_with_the_mouse_and_all_of_it_by_a_double_click() -> None:
    text = Text("one two\nthree four\nfive")
    async with mounted(text) as user:
        screen = user.pilot.app.screen
        await user.pilot.mouse_down(text, offset=(4, 0))
        await user.pilot.hover(text, offset=(4, 1))
        await user.pilot.mouse_up(text, offset=(4, 1))
        assert screen.get_selected_text() == "two\nthree"
        text.text_select_all()
        assert text.text_selection == SELECT_ALL
        assert screen.get_selected_text() == "one two\nthree four\nfive"
        await user.settle()
        assert user.lines[1].rstrip() == "three four"


# What it looks like


async def test_hostile_texts_are_shown_as_they_are() -> None:
    text = Text("\n".join(HOSTILE))
    async with mounted(text, size=(44, 14)) as user:
        assert text.plain.startswith("[red]not red[/red] [@click=app.bell]x[/]\n")
        assert all(cell_len(line) <= 43 for line in text.plain.splitlines())
        for size in SIZES:
            await user.resize(*size)
            await user.press("end", "home")
            for needle in HOSTILE[:6]:
                text.filter(needle)
                await user.press("n")


async def test_a_tab_takes_the_cells_that_it_is_drawn_in() -> None:
    text = Text("a\tb" + "c" * 12)
    async with mounted(text, size=(12, 4)) as user:
        assert "".join(user.lines).replace(" ", "") == "ab" + "c" * 12


def test_a_pane_of_one_column_still_wraps() -> None:
    assert [line.plain for line in wrapped(Content("abc"), 1)] == ["a", "b", "c"]
