"""The first look: a folder without a project offers a new one, MiniGPT's, the demo, or the calculator."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from textual.widgets import Input

from pipeline.errors import UserError
from tests.helpers.pilot import screen_opens, until
from tests.helpers.projects import new_project
from tui.app import Workbench
from tui.panes.text import Text
from tui.registry import SCREENS, WELCOME
from tui.screens.welcome.new import NewProject
from tui.screens.welcome.screen import WelcomeScreen
from tui.services.lora_command import LoraCommand

EMPTY = ("No runs", "No models", "No results", "not made yet", "Nothing ")  # of other projects


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "nothing").mkdir()
    return tmp_path / "nothing"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each `lora new`, which makes a project without starting a process."""
    calls: list[list[str]] = []

    async def made(
        lora: LoraCommand, command: str, *arguments: str, on_note: Callable[[str], None]
    ) -> tuple[str, str]:
        assert command == "new"
        folder = lora._folder
        calls.append(list(arguments))
        on_note("trying a few steps")
        if arguments[0] == "bad":
            raise UserError("bad is a file. Name another folder.")
        new_project(folder / arguments[0])
        (folder / arguments[0] / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
        chosen = "chosen  value\nrank  8\n" if "--base" in arguments else ""
        return f"{chosen}{arguments[0]}: added params.yaml\nNext: cd {arguments[0]}", ""

    monkeypatch.setattr(LoraCommand, "run", made)
    return calls


def mode(app: Workbench) -> str:
    return app.current_mode


@pytest.mark.parametrize(
    ("params", "files", "expected"),
    [
        ("params.yaml", (), WELCOME),
        ("mine.yaml", ("params.yaml", "dvc.yaml"), WELCOME),
        ("params.yaml", ("dvc.yaml",), "pipeline"),  # a project that lost its params says so
        ("params.yaml", ("params.yaml",), "pipeline"),
    ],
    ids=["empty", "missing-params-file", "lost-params", "project"],
)
async def test_it_is_shown_where_there_is_no_project(
    nothing: Path, params: str, files: Sequence[str], expected: str
) -> None:
    for name in files:
        (nothing / name).write_text(
            "stages: {}\n" if name == "dvc.yaml" else "base: minigpt\n", encoding="utf-8"
        )
    app = Workbench(nothing / params)
    async with app.run_test():
        assert mode(app) == expected


async def test_minigpts_project_is_made_and_opened(nothing: Path, asked: list[list[str]]) -> None:
    app = Workbench(nothing / "params.yaml")
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("p")
        await until(pilot, lambda: mode(app) == "pipeline")
        assert asked == [["minigpt"]]
        assert app.root == nothing / "minigpt"
        assert app.project_watch.project is not None and not app.project_watch.problem
        await until(pilot, lambda: len(app.project_watch.states) == len(app.project_watch.stages))
        assert app.message_history[-1].text == "minigpt is made. R runs it."


@pytest.mark.slow
async def test_a_new_project_is_asked_for_and_made(nothing: Path, asked: list[list[str]]) -> None:
    app = Workbench(nothing / "params.yaml")
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.focused, Input))
        await pilot.press("ctrl+u", *"run", "down", *"org/base", "enter")
        dialog = app.screen
        assert isinstance(dialog, NewProject)
        assert "org/base needs data to train on" in str(dialog.note.content)
        assert asked == []
        await pilot.press("down", *"a.csv, b.csv", "down", *"prompt=q, completion=a")
        await pilot.press("down", *"lora,full", "enter")
        await until(
            pilot, lambda: mode(app) == "pipeline" and type(app.screen).__name__ == "Reader"
        )
        assert asked == [
            [
                "run",
                "--base",
                "org/base",
                "--data",
                "a.csv",
                "--data",
                "b.csv",
                "--columns",
                "prompt=q, completion=a",
                "--methods",
                "lora,full",
            ]
        ]
        report = app.screen.query_one(Text).plain
        assert "rank  8" in report and "Next" not in report


@pytest.mark.usefixtures("asked")
async def test_what_is_wrong_is_one_sentence_and_the_form_stays(nothing: Path) -> None:
    app = Workbench(nothing / "params.yaml")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.focused, Input))
        await pilot.press("ctrl+u", *"bad", "enter")
        note = (await screen_opens(pilot, NewProject)).note
        await until(pilot, lambda: note.has_class("wrong"))
        assert str(note.content) == "✗ bad is a file. Name another folder."
        await pilot.press("escape")
        assert isinstance(app.screen, WelcomeScreen)


@pytest.mark.slow
async def test_the_calculator_by_arrows_and_by_its_number(nothing: Path) -> None:
    app = Workbench(nothing / "params.yaml")
    async with app.run_test() as pilot:
        await pilot.press("down", "down", "down", "enter")
        await until(pilot, lambda: mode(app) == "calculator")
    app = Workbench(nothing / "params.yaml")
    async with app.run_test() as pilot:
        await pilot.press(str(list(SCREENS).index("calculator") + 1))
        await until(pilot, lambda: mode(app) == "calculator")


@pytest.mark.parametrize("size", [(200, 60), (60, 16), (30, 8)], ids=["200x60", "60x16", "30x8"])
async def test_it_is_drawn_at_every_size_and_help_and_palette_open(
    nothing: Path, size: tuple[int, int]
) -> None:
    app = Workbench(nothing / "params.yaml")
    async with app.run_test(size=size) as pilot:
        await pilot.press("question_mark")
        await until(pilot, lambda: type(app.screen).__name__ == "Reader")
        await pilot.press("escape", "ctrl+p")
        await until(pilot, lambda: type(app.screen).__name__ == "CommandPalette")
        await pilot.press("escape")
        assert "run" not in [
            active.binding.action
            for active in app.screen.active_bindings.values()
            if active.enabled
        ]


@pytest.mark.slow
async def test_the_demo_is_opened_and_every_screen_shows_it(nothing: Path) -> None:
    app = Workbench(nothing / "params.yaml")
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("d")
        await until(pilot, lambda: mode(app) == "pipeline")
        await until(pilot, lambda: len(app.project_watch.states) == len(app.project_watch.stages))
        assert {state.state for state in app.project_watch.states.values()} == {"current"}
        assert "This is a demo" in app.message_history[-1].text
        for name in SCREENS:
            app.switch_mode(name)
            await until(pilot, lambda name=name: mode(app) == name and app.screen.is_mounted)  # type: ignore[misc]
            await pilot.pause()
            assert not [
                message for message in app.message_history if message.severity != "information"
            ]
            drawn = app.export_screenshot().replace("&#160;", " ")
            # the log of an import: it was not run here
            drawn = drawn.replace("Nothing was printed", "")
            assert not [text for text in EMPTY if text in drawn], name


async def test_lora_new_makes_a_project_and_says_what_is_wrong(nothing: Path) -> None:
    (nothing / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"^file is a file\. Name another folder\.$"):
        await LoraCommand(nothing).run("new", "file")


@pytest.mark.parametrize(
    "options", [["--demo", "--params", "params.yaml"]], ids=["demo-and-params"]
)
def test_wrong_usage_is_one_sentence(nothing: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "tui", *options]
    done = subprocess.run(command, cwd=nothing, capture_output=True, text=True, check=False)
    expected = (
        "error: --demo opens a project of its own, so it takes no --params. Leave out one of "
        "them.\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
