"""A Markdown page in lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.panes import HOSTILE
from tui.panes.markdown import markdown

VARIABLES = {"accent": "#4FC1E9", "text-muted": "#808080"}


def plain(text: str, width: int) -> list[str]:
    return [line.plain for line in markdown(text, VARIABLES)(width)]


def test_no_number_of_a_table_is_cut() -> None:
    table = (
        "| model | parameters | a long heading of many words |\n|---|---:|---|\n| lora | "
        "1,234,567,890 | 0.123456 |\n"
    )
    for width in (10, 40, 100):
        text = "\n".join(plain(table, width))
        assert "1,234,567,890" in text and "0.123456" in text and "…" not in text


def test_texts_wrap_at_the_width() -> None:
    lines = [line.plain for line in markdown("word " * 50, VARIABLES, least_width=10)(30)]
    assert all(len(line) <= 30 for line in lines) and len(lines) > 8


def test_a_page_is_not_narrower_than_can_be_read() -> None:
    assert len(plain("word " * 50, 5)) == len(plain("word " * 50, 50))


def test_pictures_are_named() -> None:
    assert plain("![Loss](loss.png)", 60)[0] == "▣ Loss (f shows it)"


def test_markup_of_the_terminal_is_text() -> None:
    assert "[bold]x[/bold]" in plain("[bold]x[/bold]", 60)[0]


@pytest.mark.parametrize("variables", [VARIABLES, {"accent": "#ffffff", "text-muted": "auto 60%"}])
def test_headings_and_code_have_styles_of_the_theme(variables: dict[str, str]) -> None:
    heading, _, code = markdown("# Loss\n\n`rank`", variables)(60)
    assert heading.plain == "Loss" and code.plain == "rank"
    assert all(line.spans for line in (heading, code))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_laid_out(text: str) -> None:
    assert "".join(plain(f"# {text}\n\n| {text} |\n|---|\n| {text} |", 40)) is not None


@given(st.text(), st.integers(1, 200))
def test_any_text_is_laid_out_at_any_width(text: str, width: int) -> None:
    assert all("\n" not in line for line in plain(text, width))
