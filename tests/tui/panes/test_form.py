"""A form: fields are moved between, typed in, checked, folded and found; texts and values agree."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from tests.helpers.pilot import until
from tui.panes.fields import (
    Field,
    Kind,
    counting,
    cycling,
    doubling,
    format_value,
    parse_names,
)
from tui.panes.form import Form


def at_least_1(value: Any) -> str:
    return "" if isinstance(value, int) and value >= 1 else f"must be at least 1, got {value!r}"


FIELDS = (
    Field("name", default="qwen", meaning="what is trained", search=lambda text: found(text)),
    Field("method", "choice", "lora", choices=("lora", "full"), names={"full": "all weights"}),
    Field(
        "rank", "integer", 8, rule="at least 1", problem=at_least_1, step=doubling, path="f.rank"
    ),
    Field("precision", placeholder="bf16", choices=("fp32", "bf16")),
    Field("batch", "integer", 1, step=counting, group="memory", sign="●", note="was 4"),
    Field("optimizer", default="adamw", group="memory", meaning="what steps the weights"),
)


def found(text: str) -> dict[str, str]:
    names = {"qwen": "by Alibaba", "gemma": "by Google", "gpt2": "by OpenAI"}
    return {name: by for name, by in names.items() if text and text in name}


class Page(App[None]):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.heard: list[Any] = []

    def compose(self) -> ComposeResult:
        yield self.form

    def on_form_changed(self, event: Form.Changed) -> None:
        self.heard.append(event)

    def on_form_submitted(self, event: Form.Submitted) -> None:
        self.heard.append(event)

    def on_form_lost(self, event: Form.Lost) -> None:
        self.heard.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kind)]


@asynccontextmanager
async def shown(
    fields: Sequence[Field] = FIELDS, size: tuple[int, int] = (60, 20), **options: Any
) -> AsyncIterator[tuple[Pilot[None], Form, Page]]:
    app = Page(Form(fields, **options))
    async with app.run_test(size=size) as pilot:
        if app.focused is None:
            await pilot.press("tab")
        yield pilot, app.form, app


def line_of(form: Form, label: str) -> str:
    return next(line for line in form.lines() if label in line)


# Always typed in


async def test_what_is_typed_replaces_the_value_and_moving_keeps_it() -> None:
    async with shown(always=True) as (pilot, form, app):
        await pilot.press("down", "down", *"16", "down", *"fp", "up")
        assert form.key == "rank"
        assert (form.value("rank"), form.texts["precision"]) == (16, "fp")
        assert form.input.value == "16" and len(app.of(Form.Changed)) >= 4
        await pilot.press("tab", "shift+tab", "shift+tab", "shift+tab")
        assert form.key == "name"


async def test_a_choice_steps_by_arrows_signs_pages_and_clicks() -> None:
    async with shown(always=True) as (pilot, form, app):
        await pilot.press("down")
        assert "‹ lora ›" in line_of(form, "method")
        for key in ("right", "left", "plus", "minus", "pagedown", "pageup"):
            await pilot.press(key)
        assert form.texts["method"] == "lora" and len(app.of(Form.Changed)) == 6
        await pilot.press("right")
        assert "‹ all weights ›" in line_of(form, "method"), "it is shown by its name"
        at = (line_of(form, "method").index("‹"), form._tops["method"])
        await pilot.click(form, offset=at)
        await pilot.click(form, offset=(at[0] + 3, at[1]))
        assert form.texts["method"] == "full"


async def test_numbers_step_by_signs_and_pages_an_empty_one_from_what_it_stands_for() -> None:
    async with shown(always=True) as (pilot, form, _):
        await pilot.press("down", "down", "+", "+", "-", "pagedown")
        assert form.value("rank") == 32
        await pilot.press("down", "pagedown")
        assert form.texts["precision"] == "fp32", "bf16 is the last"
        await pilot.press("ctrl+b")
        assert form.texts["precision"] == ""


async def test_an_invalid_value_is_marked_and_said() -> None:
    async with shown(always=True) as (pilot, form, _):
        await pilot.press("down", "down", "0")
        assert line_of(form, "rank").startswith("✗")
        assert "✗ must be at least 1, got 0" in "\n".join(form.lines())
        await pilot.press("5")
        assert "✗" not in "\n".join(form.lines())


async def test_matches_are_listed_while_one_types_and_one_is_taken() -> None:
    async with shown(always=True) as (pilot, form, app):
        await pilot.press("g")
        assert [line.split()[0] for line in form.lines() if " by " in line] == ["gemma", "gpt2"]
        await pilot.press("down", "enter")
        assert form.texts["name"] == "gpt2" and app.of(Form.Submitted)[-1].text == "gpt2"
        assert not any(" by " in line for line in form.lines())
        await pilot.press("ctrl+u", "g")
        await pilot.click(form, offset=(8, 1))
        assert form.texts["name"] == "gemma"
        await pilot.press("ctrl+u", "g", "tab")
        assert form.key == "method" and form.texts["name"] == "g"


async def test_where_a_field_is_left_out_the_cursor_goes_to_the_next() -> None:
    async with shown(always=True) as (pilot, form, _):
        await pilot.press("down", "down", *"16")
        form.show((FIELDS[0], FIELDS[3]), {"name": "other"}, again=True)
        await pilot.pause()
        assert form.key == "precision" and not any("rank" in line for line in form.lines())
        assert form.texts == {"name": "other", "precision": ""}


async def test_a_field_that_is_given_a_text_has_it_as_if_it_was_typed() -> None:
    async with shown(always=True) as (pilot, form, app):
        form.put("rank", "4")
        form.put("name", "new")
        await pilot.pause()
        assert (form.value("rank"), form.input.value, form.texts["name"]) == (4, "new", "new")
        assert len(app.of(Form.Changed)) == 2


async def test_heads_are_shown_where_there_is_room() -> None:
    async with shown(always=True, size=(60, 30)) as (pilot, form, _):
        assert " memory" in form.lines()
        await pilot.press(*["down"] * 9)
        assert form.key == "optimizer"
        await pilot.resize_terminal(60, 8)
        await pilot.pause()
        assert " memory" not in form.lines()
        await until(pilot, lambda: 0 <= form._tops["optimizer"] - form.scroll_offset.y < 8)


async def test_tab_leaves_the_form_at_its_ends() -> None:
    async with shown(FIELDS[:2], always=True) as (pilot, form, _):
        assert form.check_action("tab", (1,)) and not form.check_action("tab", (-1,))
        await pilot.press("tab")
        assert not form.check_action("tab", (1,)) and form.check_action("tab", (-1,))


# Written one at a time


async def test_enter_opens_checks_and_submits_and_esc_keeps_what_was() -> None:
    async with shown() as (pilot, form, app):
        await pilot.press("down", "down", "enter", "0", "enter")
        assert not app.of(Form.Submitted) and "✗ must be" in "\n".join(form.lines())
        await pilot.press("ctrl+u", *"16")
        assert "Enter writes f.rank, Esc keeps 8." in "\n".join(form.lines())
        assert form.unsaved() == "f.rank: 16"
        await pilot.press("escape")
        assert (form.texts["rank"], form.unsaved(), form.has_focus) == ("8", "", True)
        await pilot.press("e", *"16", "enter")
        submitted = app.of(Form.Submitted)[-1]
        assert (submitted.key, submitted.text, form.is_typing) == ("rank", "16", True)
        form.close()
        assert app.focused is form and form.texts["rank"] == "8"
        await pilot.press("enter", "enter")
        assert not form.is_typing, "the same value is not submitted"


async def test_arrows_step_through_the_values_of_an_open_choice() -> None:
    async with shown() as (pilot, form, _):
        await pilot.press("down", "enter", "down")
        assert form.input.value == "full"
        await pilot.press("up")
        assert form.input.value == "lora"


async def test_groups_fold_and_the_filter_looks_into_all() -> None:
    async with shown() as (pilot, form, _):
        assert form.lines()[-1] == "▸ memory (2)"
        await pilot.press("end", "right")
        assert form.lines()[-3:] == [
            "▾ memory (2)",
            "●   batch     1 was 4",
            "    optimizer adamw",
        ]
        await pilot.press("down", "left")
        assert form.key == "(memory)" and form.lines()[-1] == "▸ memory (2)"
        await pilot.press("space", "space", "enter")
        assert "▾ memory (2)" in form.lines()
        await pilot.press("left")
        form.filter("STEPS")
        assert [line.split()[0] for line in form.lines()[:2]] == ["▾", "optimizer"]
        assert form.key == "optimizer", "Enter edits what was found"
        form.filter("nowhere")
        assert form.lines() == [] or form.lines() == [""]
        form.filter("")
        form.point("nothing")
        assert form.key == "name"
        form.point("batch")
        assert form.key == "batch" and "▾ memory (2)" in form.lines()


async def test_shown_again_the_cursor_and_what_is_typed_stay() -> None:
    async with shown() as (pilot, form, app):
        await pilot.press("down", "down", "enter", *"16")
        form.show(FIELDS, {"rank": 4}, again=True)
        await pilot.pause()
        assert (form.key, form.input.value, form.given["rank"]) == ("rank", "16", 4)
        form.show(FIELDS[:2])
        await pilot.pause()
        lost = app.of(Form.Lost)
        assert [event.unsaved for event in lost] == ["f.rank: 16"]
        assert form.key == "name" and not form.is_typing and form.has_focus
        await pilot.press("enter", "x")
        form.filter("method")
        await pilot.pause()
        assert len(app.of(Form.Lost)) == 2, "its line is gone"


async def test_a_click_points_then_opens() -> None:
    async with shown() as (pilot, form, _):
        await pilot.click(form, offset=(4, form._tops["rank"]))
        assert form.key == "rank" and not form.is_typing
        await pilot.click(form, offset=(4, form._tops["rank"]))
        assert form.is_typing
        await pilot.press("escape")
        await pilot.click(form, offset=(4, form._tops["(memory)"]))
        await pilot.click(form, offset=(4, form._tops["(memory)"]))
        assert "▾ memory (2)" in form.lines()


# Any form


async def test_an_empty_form_has_no_line_for_any_key() -> None:
    async with shown(()) as (pilot, form, _):
        assert form.lines() == []
        await pilot.press("enter", "down", "left", "space", "ctrl+b", "e")
        form.show(FIELDS)
        assert form.key == "name"


@pytest.mark.parametrize("always", [False, True])
async def test_two_hundred_fields_at_every_size(always: bool) -> None:
    fields = [Field(f"key_{n}", default=f"{n}\n\x1b[red]" * (n % 7)) for n in range(200)]
    async with shown(fields, always=always) as (pilot, form, _):
        for size in ((200, 60), (30, 8), (80, 24), (8, 3), (120, 40)):
            await pilot.resize_terminal(*size)
            await pilot.press("end", "pageup", "home", "down")
        form.point("key_150")
        await until(
            pilot,
            lambda: 0 <= form._tops["key_150"] - form.scroll_offset.y < form.size.height,
        )
        assert all("\n" not in line for line in form.lines())


VALUES = st.one_of(
    st.booleans().map(lambda value: ("boolean", value)),
    st.integers(-(10**15), 10**15).map(lambda value: ("integer", value)),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda value: ("number", value)),
    st.text().map(lambda value: ("text", value.strip())),
    st.lists(st.text(min_size=1).filter(lambda text: text.strip() == text)).map(
        lambda value: ("names", tuple(value))
    ),
    st.dictionaries(
        st.from_regex("[a-z_]{1,8}", fullmatch=True), st.integers() | st.booleans()
    ).map(lambda value: ("mapping", value)),
)


@given(VALUES)
def test_a_value_is_read_back_as_it_is_written(kind_and_value: tuple[Any, Any]) -> None:
    kind, value = kind_and_value
    expected = list(value) if isinstance(value, tuple) else value
    assert Field("key", kind).parse(format_value(value)) == expected


@given(st.sampled_from(get_args(Kind)), st.text())
def test_any_text_is_a_value_or_stays_a_text(kind: Any, text: str) -> None:
    Field("key", kind).parse(text)


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("a",),
        ("a b", " euro"),
        ("[INST]", "a,b", '"', "'", "#", "a: b", "-", "\n", "ß🤗", "on", "1"),
    ],
    ids=str,
)
def test_names_round_trip(values: tuple[str, ...]) -> None:
    assert parse_names(format_value(values)) == list(values)


def test_texts_that_are_no_number_stay_texts() -> None:
    texts = ("", "x", "1.5", "٣", "1:30", "9" * 5000)
    assert [Field("key", "integer").parse(text) for text in texts] == list(texts)
    assert Field("key", "integer").parse("023") == 23
    assert Field("key", "mapping").parse("rate: [1e-3, 2]") == {"rate": ["1e-3", 2]}
    assert Field("key", "list").parse("1, 2") == Field("key", "list").parse("[1, 2]") == [1, 2]
    assert Field("key", "list").parse("1, [") == ["1", "["]
    assert Field("key", "files").parse("a.csv, {path: b, weight: 2}") == [
        "a.csv",
        {"path": "b", "weight": 2.0},
    ]


def test_steps() -> None:
    assert [doubling(text, 1) for text in ("3", "4", "x")] == ["4", "8", "1"]
    assert [doubling(text, -1) for text in ("3", "4", "1")] == ["2", "2", "1"]
    assert [counting("1", -1), counting("9", 1)] == ["1", "10"]
    assert [cycling(("a", "b"))(text, 1) for text in ("a", "b", "?")] == ["b", "a", "a"]
