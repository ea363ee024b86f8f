"""A Markdown page in lines."""

import pytest
from textual.app import App, ComposeResult

from tests.helpers.pilot import until
from tui.themes import DARK
from tui.widgets.markdown_page import MarkdownPage, lay_out

VARIABLES = {"accent": "#4FC1E9", "text-muted": "#808080"}


def plain(text: str, width: int) -> list[str]:
    return [
        "".join(segment.text for segment in line).rstrip()
        for line in lay_out(text, width, VARIABLES)
    ]


def test_no_number_of_a_table_is_cut() -> None:
    table = (
        "| model | parameters | a long heading of many words |\n|---|---:|---|\n| lora | "
        "1,234,567,890 | 0.123456 |\n"
    )
    for width in (10, 40, 100):
        text = "\n".join(plain(table, width))
        assert "1,234,567,890" in text and "0.123456" in text and "…" not in text


def test_texts_wrap_at_the_width() -> None:
    assert all(len(line) <= 30 for line in plain("word " * 50, 30))


def test_pictures_are_named() -> None:
    assert plain("![Loss](loss.png)", 60)[0] == "▣ Loss (f shows it)"


def test_markup_of_the_terminal_is_text() -> None:
    assert "[bold]x[/bold]" in plain("[bold]x[/bold]", 60)[0]


class Reader(App[None]):
    def compose(self) -> ComposeResult:
        yield MarkdownPage()

    def on_mount(self) -> None:
        self.register_theme(DARK)
        self.theme = DARK.name


@pytest.mark.slow
async def test_a_page_is_searched_and_moved_in() -> None:
    app = Reader()
    async with app.run_test(size=(60, 10)) as pilot:
        page = app.query_one(MarkdownPage)
        page.show(
            "\n\n".join(f"line {n}" for n in range(100))
            + "\n\n| a | b |\n|---|---|\n| "
            + "x" * 100
            + " | y |\n"
        )
        await until(pilot, lambda: "line 99" in page.plain)
        page.find("LINE 5")
        await until(pilot, lambda: page.scroll_offset.y == page.matches[0])
        assert len(page.matches) == 11
        await pilot.press("n")
        assert page.scroll_offset.y == page.matches[1]
        page.find("nowhere")
        assert page.matches == []
        await pilot.press("G", "right", "g")
        assert page.virtual_size.width > 100
        app.theme = "textual-light"
        await pilot.resize_terminal(90, 12)
        await until(pilot, lambda: "line 99" in page.plain)
