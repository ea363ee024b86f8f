"""The data screen: files, rows, masks, problems, search, and edits, on real files and the real
reading process.
"""

import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from pipeline.stages.registry import open_project
from tests.helpers.chat_projects import PARAMS, new_chat_project
from tests.helpers.json_files import read_json
from tests.helpers.pilot import screen_opens, until
from tui.app import Workbench
from tui.dialogs import AskText
from tui.panes.menu import Menu
from tui.screens.data.editor import Editor
from tui.screens.data.screen import DataScreen

pytestmark = pytest.mark.usefixtures("forked_processes")


def turns(*texts: str) -> str:
    roles = ("user", "assistant") * len(texts)
    return json.dumps(
        {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}
    )


ROWS = [
    turns("Where is Sofia?", "In the west."),
    turns(
        "Where?",
        "Here.",
        "And Varna?",
        "By the sea, where the ships are and the euro is the currency of the land.",
    ),
    '{"messages": [{"role": "user"',
    turns("\x1b[31mred [bold]not markup[/bold]", "ok"),
    turns("Where is Sofia?", "In the west."),
    *(turns(f"Question {n}?", f"Answer {n}.") for n in range(300)),
]


@pytest.fixture
def chat_project(tmp_path: Path) -> Path:
    """A project on a chat model that is not imported yet, with its tokenizer."""
    return new_chat_project(tmp_path / "project", "".join(f"{row}\n" for row in ROWS), 99)


@asynccontextmanager
async def open_data(
    root: Path, size: tuple[int, int] = (120, 40)
) -> AsyncIterator[tuple[Pilot[Any], DataScreen]]:
    """Open the screen, and wait until a row and the report are shown."""
    app = Workbench(root / "params.yaml")
    app.first_screen = "data"
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, DataScreen)
        await until(pilot, lambda: is_read(screen))
        yield pilot, screen


def is_read(screen: DataScreen) -> bool:
    row = screen.row.row
    return row is not None and row["event"] == "done"


def row_text(screen: DataScreen) -> str:
    return screen.row.text.plain


def title(screen: DataScreen, pane: str) -> str:
    return str(screen.query_one(f"#{pane}").border_title)


def drawn(screen: DataScreen) -> str:
    """The plot of lengths."""
    return screen.report.plot.plain


def count(screen: DataScreen) -> int:
    return len(screen.rows.lines)


def cursor(screen: DataScreen) -> int:
    return screen.rows.table.cursor


async def at_row(pilot: Pilot[Any], screen: DataScreen, number: int) -> None:
    await until(pilot, lambda: title(screen, "row").split("  ")[0] == f"Row {number}")


async def checked(pilot: Pilot[Any], screen: DataScreen) -> None:
    await until(pilot, lambda: str(screen.report.problems.nothing) == "✓ none")


def reading(editor: Any) -> str:
    """What the dialog says of the row."""
    return str(editor.reading.content)


@pytest.mark.slow
async def test_the_first_file_is_what_lora_trains_on_with_the_mask_of_its_first_row(
    chat_project: Path,
) -> None:
    async with open_data(chat_project) as (pilot, screen):
        assert screen.reader.file.name == "data/chat.jsonl"
        await until(pilot, lambda: "305" in title(screen, "rows"))
        assert "⟦In the west.<|im_end|>⟧" in row_text(screen) and "── user" in row_text(screen)
        assert "trained on" in title(screen, "row")
        await until(pilot, lambda: screen.rows.lines[0].tokens)
        files = screen.files.texts()
        assert "● chat.jsonl  lora" in files and "  heldout.csv  lora: held-out" in files


@pytest.mark.slow
async def test_the_turn_where_a_conversation_is_cut_is_named_and_marked(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        await pilot.press("j")
        await at_row(pilot, screen, 2)
        assert "cut from turn" in title(screen, "row")
        assert "⊣─ cut at 64 tokens" in row_text(screen)


@pytest.mark.slow
async def test_a_row_that_cannot_be_read_is_a_row_with_its_problem(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        await pilot.press("j", "j")
        await at_row(pilot, screen, 3)
        assert row_text(screen).startswith("✗ not JSON") and ROWS[2] in row_text(screen)


@pytest.mark.slow
async def test_text_of_others_is_shown_as_it_is(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        screen.rows.table.go_to(3)
        await at_row(pilot, screen, 4)
        assert "\\x1b[31mred [bold]not markup[/bold]" in row_text(screen)
        assert "\x1b" not in screen.rows.table.texts()[3]


@pytest.mark.slow
async def test_problems_are_listed_and_lead_to_their_rows(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        await checked(pilot, screen)
        assert "1 error" in title(screen, "problems")
        problems = screen.report.problems.texts()
        assert problems[0].startswith("✗ 3  not JSON")
        assert any("the same as row 1" in problem for problem in problems)
        screen.rows.table.go_to(0)
        await pilot.press("n")
        await until(pilot, lambda: cursor(screen) == 1)
        await pilot.press("n")
        await until(pilot, lambda: cursor(screen) == 2)
        await pilot.press("N")
        await until(pilot, lambda: cursor(screen) == 1)
        screen.set_focus(screen.report.problems)
        await pilot.press("home", "enter")
        await until(pilot, lambda: cursor(screen) == 2)


@pytest.mark.slow
async def test_lengths_say_how_many_are_cut(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        await checked(pilot, screen)
        assert re.search(r"[1-9]\d* cut \(\d+%\)", title(screen, "lengths"))
        assert "max_length 64 ▲" in drawn(screen)


@pytest.mark.slow
async def test_pages_are_read_as_one_moves_and_only_then(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        read, table = screen.rows.lines.read, screen.rows.table
        await until(pilot, lambda: count(screen) == len(ROWS))
        assert len(read) <= 100
        await pilot.press("G")
        await at_row(pilot, screen, len(ROWS))
        assert "Question 299?" in table.line(len(ROWS) - 1).plain
        assert 150 not in read, "what was passed over is not read"
        await pilot.press("g", "pagedown", "k")
        assert table.cursor == table.page_height - 2


@pytest.mark.slow
async def test_a_row_that_is_not_read_yet_has_a_place_in_the_list(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        await until(pilot, lambda: count(screen) == len(ROWS))
        del screen.rows.lines.read[5]
        assert screen.rows.table.line(5).plain == "…"


@pytest.mark.slow
async def test_search_shows_the_rows_that_have_it_and_esc_all_on_the_same_row(
    chat_project: Path,
) -> None:
    async with open_data(chat_project) as (pilot, screen):
        await pilot.press("slash", *"ANSWER 29")
        await until(pilot, lambda: count(screen) == 11)  # 29, 290 to 299
        assert "11 of 305" in title(screen, "rows")
        await pilot.press("enter", "down")
        await at_row(pilot, screen, 296)
        await pilot.press("slash", "escape")
        await until(pilot, lambda: count(screen) == len(ROWS))
        assert cursor(screen) == 295
        await pilot.press("slash", *"#7")
        await until(pilot, lambda: cursor(screen) == 6)


@pytest.mark.slow
async def test_a_row_is_edited_into_a_copy_and_the_original_stays(chat_project: Path) -> None:
    before = (chat_project / "data/chat.jsonl").read_bytes()
    async with open_data(chat_project) as (pilot, screen):
        await pilot.press("e")
        await screen_opens(pilot, Editor)
        editor = pilot.app.screen
        await until(pilot, lambda: "tokens" in reading(editor))
        assert screen.unsaved() == ""
        await pilot.press("end", *" Yes.")
        assert (
            screen.unsaved() and editor.query_one("#out", Input).value == "data/chat.edited.jsonl"
        )
        await pilot.press("ctrl+s")
        await screen_opens(pilot, Menu)
        lines = (chat_project / "data/chat.edited.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[0])["messages"][1]["content"] == "In the west. Yes."
        assert lines[1:] == ROWS[1:] and (chat_project / "data/chat.jsonl").read_bytes() == before
        await pilot.press("enter")  # train LoRA on it
        await until(
            pilot,
            lambda: (
                open_project(chat_project / "params.yaml").params.finetune_lora.files
                != ("data/chat.jsonl",)
            ),
        )
        assert open_project(chat_project / "params.yaml").params.finetune_lora.files == (
            "data/chat.edited.jsonl",
        )
        await until(
            pilot,
            lambda: screen.reader.file.name == "data/chat.edited.jsonl" and screen.row.row,
        )
        await pilot.press("z")
        assert open_project(chat_project / "params.yaml").params.finetune_lora.files == (
            "data/chat.jsonl",
        )


@pytest.mark.slow
async def test_a_broken_row_is_edited_as_text_and_esc_asks_before_it_drops_that(
    chat_project: Path,
) -> None:
    async with open_data(chat_project) as (pilot, screen):
        screen.rows.table.go_to(2)
        await at_row(pilot, screen, 3)
        await pilot.press("e")
        await screen_opens(pilot, Editor)
        editor = pilot.app.screen
        assert editor.query_one(TextArea).text == ROWS[2]
        await until(pilot, lambda: "not JSON" in reading(editor))
        await pilot.press("ctrl+s")
        assert pilot.app.screen is editor, "what is no JSON is not written"
        await pilot.press("x", "escape")
        assert pilot.app.screen is editor
        await pilot.press("escape")
        await until(pilot, lambda: pilot.app.screen is screen)
        assert not (chat_project / "data/chat.edited.jsonl").exists()


@pytest.mark.slow
async def test_all_of_a_row_can_be_edited_as_json(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, _):
        await pilot.press("e")
        await screen_opens(pilot, Editor)
        editor = pilot.app.screen
        assert isinstance(editor, Editor) and len(editor.query(TextArea)) == 2
        await pilot.press("ctrl+t")
        await until(pilot, lambda: len(editor.query(TextArea)) == 1)
        editor.query_one(TextArea).text = '{"text": "all of it"}'
        await pilot.press("ctrl+t")
        await until(pilot, lambda: editor.query_one(TextArea).text == "all of it")


async def test_a_corrected_answer_becomes_a_row_that_the_next_run_trains_on(
    chat_project: Path,
) -> None:
    async with open_data(chat_project) as (pilot, screen):
        record = json.loads(turns("Where is Varna?", "In the west."))
        pilot.app.go("data", add=record)  # type: ignore[attr-defined]  # as the chat does
        await screen_opens(pilot, Editor)
        area = pilot.app.screen.query(TextArea).last()
        assert area.has_focus and area.text == "In the west."
        area.text = "By the sea."
        await pilot.press("ctrl+s")
        await screen_opens(pilot, Menu)
        (line,) = (chat_project / "data/corrections.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["messages"][1]["content"] == "By the sea."
        await pilot.press("enter")
        files = ("data/chat.jsonl", "data/corrections.jsonl")
        await until(
            pilot,
            lambda: open_project(chat_project / "params.yaml").params.finetune_lora.files == files,
        )
        await until(pilot, lambda: "⟦By the sea.<|im_end|>⟧" in row_text(screen))


@pytest.mark.slow
async def test_what_is_typed_after_tab_goes_into_a_text_and_the_file_has_a_key_of_its_own(
    chat_project: Path,
) -> None:
    async with open_data(chat_project) as (pilot, _):
        pilot.app.go("data", add=json.loads(turns("Where is Varna?", "In the west.")))  # type: ignore[attr-defined]
        await screen_opens(pilot, Editor)
        editor = pilot.app.screen
        question, answer = editor.query(TextArea)
        await pilot.press("tab", "end", *" Now")
        assert question.text == "Where is Varna? Now", "Tab after the last text goes to the first"
        await pilot.press("tab", "end", *" Or not.", "shift+tab")
        assert answer.text == "In the west. Or not." and question.has_focus
        await pilot.press("ctrl+o")
        assert editor.query_one("#out", Input).has_focus
        await pilot.press("tab")
        assert (
            question.has_focus and editor.query_one("#out", Input).value == "data/corrections.jsonl"
        )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("corrections.txt", "rows are added to a .jsonl file"),
        ("base/config.json/rows.jsonl", "File exists"),
    ],
)
@pytest.mark.slow
async def test_a_corrected_answer_that_cannot_be_written_stays_in_the_editor(
    chat_project: Path, name: str, reason: str
) -> None:
    async with open_data(chat_project) as (pilot, _):
        pilot.app.go("data", add=json.loads(turns("Where is Varna?", "In the west.")))  # type: ignore[attr-defined]
        await screen_opens(pilot, Editor)
        editor = pilot.app.screen
        editor.query(TextArea).last().text = "By the sea."
        out = editor.query_one("#out", Input)
        out.value = name
        await pilot.press("ctrl+s")
        await until(pilot, lambda: reason in reading(editor))
        assert pilot.app.screen is editor and editor.query(TextArea).last().text == "By the sea."
        out.value = "data/mine.jsonl"
        await pilot.press("ctrl+s")
        await screen_opens(pilot, Menu)
        written = (chat_project / "data/mine.jsonl").read_text(encoding="utf-8")
        assert json.loads(written)["messages"][1]["content"] == "By the sea."


@pytest.mark.slow
async def test_a_row_whose_copy_cannot_be_written_stays_in_the_editor(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, _):
        await pilot.press("e")
        await screen_opens(pilot, Editor)
        editor = pilot.app.screen
        await pilot.press("end", *" Yes.")
        editor.query_one("#out", Input).value = "data/heldout.csv"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "✗" in reading(editor))
        assert (
            pilot.app.screen is editor and editor.query(TextArea).last().text == "In the west. Yes."
        )


@pytest.mark.slow
async def test_esc_asks_before_it_drops_a_row_that_was_to_be_written_with_its_problem(
    chat_project: Path,
) -> None:
    async with open_data(chat_project) as (pilot, _):
        await pilot.press("e")
        await screen_opens(pilot, Editor)
        editor = pilot.app.screen
        editor.query(TextArea).last().text = ""
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "Ctrl+S again" in reading(editor))
        await pilot.press("escape")
        assert pilot.app.screen is editor, "the question was about writing, not about dropping"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "Ctrl+S again" in reading(editor))
        assert pilot.app.screen is editor, "nor does the one answer the other"


@pytest.mark.parametrize("number", [0, 1, 999], ids=["same", "row", "no such row"])
@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.usefixtures("held_threads")
async def test_a_row_is_shown_though_the_page_came_before_the_count(
    chat_project: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_data(chat_project) as (pilot, screen):
        stream = screen.reader.process.stream

        async def late(do: str, **fields: Any) -> AsyncIterator[Any]:
            if do == "index":
                await until(pilot, lambda: screen.rows.lines.read)
            async for answer in stream(do, **fields):
                yield answer

        monkeypatch.setattr(screen.reader.process, "stream", late)
        screen.open_with(file="data/heldout.csv", row=number)
        await until(pilot, lambda: "⟦Here." in row_text(screen))


async def test_a_model_without_a_chat_template_gets_prompt_and_completion(
    chat_project: Path,
) -> None:
    (chat_project / "base/chat_template.jinja").unlink()
    async with open_data(chat_project) as (pilot, screen):
        screen.open_with(add=json.loads(turns("der hund", "bellt")))
        await screen_opens(pilot, Editor)
        assert [area.text for area in pilot.app.screen.query(TextArea)] == ["der hund", " bellt"]


async def test_without_a_tokenizer_the_roles_are_the_mask_and_it_is_said(
    chat_project: Path,
) -> None:
    shutil.rmtree(chat_project / "base")
    (chat_project / "params.yaml").write_text(
        PARAMS.replace("base: base", "base: org/model"), encoding="utf-8"
    )
    async with open_data(chat_project) as (pilot, screen):
        await checked(pilot, screen)
        assert "⟦In the west.⟧" in row_text(screen) and "mask by roles" in title(screen, "row")
        assert "no tokens" in str(screen.row.legend.content)
        assert "No model yet" in drawn(screen)


@pytest.mark.slow
async def test_any_file_is_opened_by_its_path_and_one_that_is_not_there_says_so(
    chat_project: Path,
) -> None:
    (chat_project / "elsewhere.txt").write_text("one\ntwo\n", encoding="utf-8")
    async with open_data(chat_project) as (pilot, screen):
        await pilot.press("o")
        await screen_opens(pilot, AskText)
        await pilot.press(*"elsewhere.txt", "enter")
        await until(
            pilot, lambda: title(screen, "rows").startswith("elsewhere.txt") and screen.row.row
        )
        assert "⟦" in row_text(screen)
        screen.open_with(file="none.jsonl")
        await until(pilot, lambda: "No such file" in row_text(screen))
        screen.open_with(file="data/chat.jsonl", row=5)
        await at_row(pilot, screen, 5)


async def test_of_a_file_with_columns_of_its_own_one_says_which_are_which(
    chat_project: Path,
) -> None:
    (chat_project / "tickets.csv").write_text("customer,reply\nHelp!,At once.\n", encoding="utf-8")
    async with open_data(chat_project) as (pilot, screen):
        screen.open_with(file="tickets.csv")
        await until(pilot, lambda: "the keys must be" in row_text(screen))
        await pilot.press("c")
        await screen_opens(pilot, AskText)
        await pilot.press(*"prompt=customer, completion=reply", "enter")
        await until(pilot, lambda: "Help!" in row_text(screen) and "⟦At once." in row_text(screen))
        screen.project_changed()
        await pilot.pause()
        assert "⟦At once." in row_text(screen), "it stays when the project is looked at again"
        screen.open_with(file="data/chat.jsonl")
        await pilot.press("c")
        assert "params.yaml says it" in screen.workbench.message_history[-1].text


@pytest.mark.slow
async def test_the_reading_process_can_die_and_the_next_file_starts_it_again(
    chat_project: Path,
) -> None:
    async with open_data(chat_project) as (pilot, screen):
        await checked(pilot, screen)
        assert screen.reader.process._process
        screen.reader.process._process._kill()
        before = screen.row.row
        await pilot.press("j")
        await until(pilot, lambda: screen.row.row is not before)
        screen.open_with(file="data/heldout.csv")
        await until(pilot, lambda: "⟦Here." in row_text(screen))


@pytest.mark.slow
async def test_rows_are_written_in_another_format(chat_project: Path) -> None:
    async with open_data(chat_project) as (pilot, screen):
        screen.open_with(file="data/heldout.csv")
        await until(pilot, lambda: screen.reader.file.name == "data/heldout.csv" and screen.row.row)
        await pilot.press("x")
        await screen_opens(pilot, AskText)
        pilot.app.screen.query_one(Input).value = "out.jsonl"
        await pilot.press("enter")
        await until(pilot, lambda: (chat_project / "out.jsonl").exists())
        assert read_json(chat_project / "out.jsonl") == {
            "prompt": "Where?",
            "completion": "Here.",
        }


@pytest.mark.parametrize("size", [(60, 16), (30, 8), (200, 60)], ids=["small", "tiny", "huge"])
@pytest.mark.sampled(3)
@pytest.mark.slow
async def test_every_size_is_drawn(chat_project: Path, size: tuple[int, int]) -> None:
    async with open_data(chat_project, size) as (pilot, screen):
        await checked(pilot, screen)
        await pilot.press("j", "plus", "plus", "tab", "tab")
        assert cursor(screen) == 1


async def test_a_folder_without_data_says_what_to_press(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").touch()  # a project that lost its params
    app = Workbench(tmp_path / "params.yaml")
    app.first_screen = "data"
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Press o" in row_text(app.screen))  # type: ignore[arg-type]
        await pilot.press("e", "n", "m", "x", "y")
        assert count(app.screen) == 0  # type: ignore[arg-type]
