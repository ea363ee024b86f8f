"""The frame of every screen: header, keys at the bottom, panes that filter and enlarge, undo, run,
stop, quit.
"""

import asyncio
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from textual.binding import Binding
from textual.command import CommandInput
from textual.widget import Widget
from textual.widgets import Input

from pipeline.project.gate import Broken, Verdict
from pipeline.project.logs.run_state import Journal
from pipeline.project.stage_graph import Stage
from pipeline.stages.registry import GRAPH
from pipeline.views.stages import StageState
from tests.helpers.pilot import screen_opens, screen_text, until
from tests.helpers.projects import load
from tui.app import Workbench
from tui.dialogs import Ask
from tui.palette import Command, Everything
from tui.panes.key_bar import KeyBar
from tui.panes.pane import About, FilterField, Pane
from tui.panes.table import Column, Table
from tui.screens.base import WorkbenchScreen
from tui.services.pipeline_process import Runner, Running
from tui.widgets.header import Header, describe_state

FRUIT = ("apple", "apricot", "banana")
ABOUT = About(
    "Fruit",
    "What **grows** on trees.",
    [Binding("e", "screen.eat", "Eat", id="fruit.eat")],
    filters="filter",
)


class FruitScreen(WorkbenchScreen):
    NAME = "fruit"
    HELP = "All that is **eaten**."
    PANES: ClassVar[dict[str, About]] = {"fruit": ABOUT}
    talk = ""
    seen = eaten = 0

    def body(self) -> Iterable[Widget]:
        self.table = Table[str](key=str, columns=[Column("name", str)])
        yield self.pane("fruit", self.table)
        yield Input(id="name")

    def on_mount(self) -> None:
        self.table.show(FRUIT)

    def action_eat(self) -> None:
        self.eaten += 1

    def unsaved(self) -> str:
        return self.talk

    def project_changed(self) -> None:
        self.seen += 1


class FruitApp(Workbench):
    MODES: ClassVar[dict[str, Any]] = {**Workbench.MODES, "fruit": FruitScreen}

    def __init__(self, root: Path) -> None:
        super().__init__(root / "params.yaml")
        self.first_screen = "fruit"

    @property
    def fruit(self) -> FruitScreen:
        assert isinstance(self.base_screen, FruitScreen)
        return self.base_screen

    @property
    def shown_fruit(self) -> list[str]:
        return self.fruit.table.texts()


def bottom(app: Workbench) -> str:
    return str(app.screen.query_one(KeyBar).render())


async def test_a_filter_narrows_its_list_and_escape_shows_all_again(empty: Path) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await screen_opens(pilot, FruitScreen)
        await pilot.press("slash", *"ap")
        assert app.shown_fruit == ["apple", "apricot"]
        assert "Enter" in bottom(app) and "F2–F9 screens" in bottom(app)
        await pilot.press("enter")
        assert isinstance(app.focused, Table) and "/ap" in str(
            app.fruit.query_one(Pane).border_title
        )
        await pilot.press("j")
        assert app.focused.pointed == "apricot"
        await pilot.press("slash", "escape")
        assert app.shown_fruit == list(FRUIT)
        assert not isinstance(app.focused, FilterField)


async def test_letters_typed_into_a_field_are_no_commands(empty: Path) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await screen_opens(pilot, FruitScreen)
        field = app.fruit.query_one("#name", Input)
        app.fruit.set_focus(field)
        await pilot.press(*"qXRz1eT", "plus", "slash", "question_mark", "colon")
        assert field.value == "qXRz1eT+/?:" and app.screen is app.fruit
        assert "esc leave" in bottom(app).lower()
        await pilot.press("escape", "e")
        # the pane has no focus
        assert not field.has_focus and app.fruit.eaten == 0
        app.fruit.set_focus(app.fruit.table)
        await pilot.press("e")
        assert app.fruit.eaten == 1


@pytest.mark.parametrize("key", ["plus", "f10"])
async def test_a_pane_fills_the_screen_and_returns(empty: Path, key: str) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: isinstance(app.focused, Table))
        pane = app.fruit.query_one(Pane)
        await pilot.press(key)
        await until(pilot, lambda: pane.size.height > 18)
        assert (
            app.screen.query_one(KeyBar).region.height
            == app.screen.query_one(Header).region.height
            == 1
        )
        await pilot.press("escape")
        await until(pilot, lambda: app.fruit.maximized is None)


async def test_help_is_of_the_focused_pane(empty: Path) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(120, 60)) as pilot:
        await until(pilot, lambda: isinstance(app.focused, Table))
        await pilot.press("question_mark")
        await until(pilot, lambda: type(app.screen).__name__ == "Reader")
        text = screen_text(app)
        for part in (
            "Fruit",
            "What grows on trees.",
            "All that is eaten.",
            "fruit.eat",
            "palette",
            "up to date",
        ):
            assert part in text


async def test_the_palette_has_commands_of_all_screens_params_stages_and_docs(empty: Path) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.project_watch.project is not None)
        app.state.prompts = ["der wind"]
        palette = Everything(app.screen)
        await palette.startup()
        helps = {
            command.text: command.help for command in [*palette._first, *await palette._others]
        }
        texts = list(helps)
        assert helps["Go to Curves"] == "key 2 F3"
        assert "finetune_lora.rank: 4" in texts and "Stage finetune_lora" in texts
        assert "Prompt: der wind" in texts and "Run" in texts and "Theme: lora-contrast" in texts
        assert any(text.startswith("Docs: ") for text in texts)
        assert sum(text.startswith("Curves: ") for text in texts) > 2


async def test_the_palette_finds_what_was_typed_before_it_had_read_the_models(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = threading.Event()

    def models(_: Workbench) -> Iterator[Command]:
        assert read.wait(60)
        yield Command("Model pear", "", lambda: None)

    monkeypatch.setattr("tui.palette._models", models)
    app = FruitApp(empty)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.project_watch.project is not None)
        app.action_command_palette()
        # not `until`, nor keys of the pilot: they would wait for the models
        async with asyncio.timeout(30):
            while not isinstance(app.focused, CommandInput):
                await asyncio.sleep(0.005)
        for typed in ("p", "pe", "pear"):
            app.focused.value = typed
            await asyncio.sleep(0.05)
        read.set()
        await until(pilot, lambda: "Model pear" in screen_text(app))


async def test_a_write_is_taken_back(empty: Path) -> None:
    app = FruitApp(empty)
    path = empty / "params.yaml"
    async with app.run_test(size=(80, 24)) as pilot:
        await screen_opens(pilot, FruitScreen)
        before = path.read_text(encoding="utf-8")
        await pilot.press("z")
        assert "Nothing to take back" in app.message_history[-1].text
        app.edits.save(path, {"finetune_lora.rank": 16})
        app.edits.save(path, {"finetune_lora.alpha": 32})
        await pilot.press("z")
        assert (
            load(path).finetune_lora.rank == 16
            and "finetune_lora.alpha" in app.message_history[-1].text
        )
        await pilot.press("z")
        assert path.read_text(encoding="utf-8") == before
        app.edits.save(path, {"finetune_lora.rank": 16})
        path.write_text(path.read_text(encoding="utf-8") + "# by hand\n", encoding="utf-8")
        await pilot.press("z")
        assert "changed by another program" in app.message_history[-1].text
        assert path.read_text(encoding="utf-8").endswith("# by hand\n")


async def test_nothing_is_started_while_the_params_are_broken(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(Runner, "start", lambda _, arguments: started.append(arguments))
    (empty / "params.yaml").write_text("finetune_lora: {rank: 0}\n", encoding="utf-8")
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await screen_opens(pilot, FruitScreen)
        await pilot.press("R")
        assert not started and app.message_history[-1].severity == "error"
        assert "rank must be at least 1" in app.message_history[-1].text
        await until(pilot, lambda: "✗ params" in str(app.screen.query_one(Header).render()))


async def test_stop_asks_first(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    monkeypatch.setattr(Runner, "running", lambda _: Running(1, "dvc repro", 0.0))

    def stop(_: Runner) -> str:
        stopped.append("x")
        return "Stopping."

    monkeypatch.setattr(Runner, "stop", stop)
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.project_watch.pipeline is not None)
        for answer, times in (("escape", 0), ("enter", 0), ("y", 1)):
            if not isinstance(app.screen, Ask):
                await pilot.press("X")
                await screen_opens(pilot, Ask)
            await pilot.press(answer)
            assert len(stopped) == times, answer


async def test_quit_asks_only_when_something_would_be_lost(empty: Path) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await screen_opens(pilot, FruitScreen)
        app.fruit.talk = "a conversation of 2 turns"
        await pilot.press("q")
        await screen_opens(pilot, Ask)
        await pilot.press("escape")
        await screen_opens(pilot, FruitScreen)
        app.fruit.talk = ""
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)


async def test_control_c_twice_quits(empty: Path) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await screen_opens(pilot, FruitScreen)
        app.fruit.talk = "a conversation"
        await pilot.press("ctrl+c")
        assert app.is_running and "again to quit" in app.message_history[-1].text
        await pilot.press("ctrl+c")
        await until(pilot, lambda: not app.is_running)


async def test_screens_hear_of_changes_while_they_are_shown_and_when_they_return(
    empty: Path,
) -> None:
    app = FruitApp(empty)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: len(app.project_watch.states) == len(app.project_watch.stages))
        screen = app.fruit
        await until(pilot, lambda: screen.seen > 0)
        await pilot.press("1")
        await until(pilot, lambda: app.screen is not screen)
        before = screen.seen
        app.edits.save(empty / "params.yaml", {"finetune_lora.rank": 16})
        app.project_watch.look_now()
        await until(pilot, lambda: app.project_watch.project.params.finetune_lora.rank == 16)  # type: ignore[union-attr]
        assert screen.seen == before
        app.switch_mode("fruit")
        await until(pilot, lambda: screen.seen == before + 1)


def state(name: str, of: Any, **journal: Any) -> StageState:
    stage: Stage = GRAPH.stages[name]
    return StageState(stage, of, (), Journal("running", 1, 0.0, **journal) if journal else None)


def test_the_header_says_what_runs_else_what_failed_else_what_is_left() -> None:
    done, lost = state("pretrain", "current"), state("finetune_lora", "failed")
    running = state("finetune_lora", "running", done=64, total=100)
    long, short, _ = describe_state([done, running], True, "x")
    assert long.startswith("▶ finetune_lora 64% ") and short == "▶ lora 64%"
    long, short, _ = describe_state([done, running], True, "", True)
    assert long.startswith("▶ stopping finetune_lora 64% ") and short == "▶ stopping lora 64%"
    assert describe_state([done], True, "")[0] == "▶ starting"
    assert describe_state([done, lost], False, "") == (
        "✗ finetune_lora",
        "✗ lora",
        "bold $error",
    )
    assert describe_state([done, state("merge", "waits")], False, "")[::2] == (
        "● 1 to run",
        "$warning",
    )
    assert describe_state([done], False, "")[0] == "✓"
    verdict = Verdict(
        ("lora",), (Broken("lora", "new_loss", 1.0, 2.0), Broken("lora", "divergence", 1.0, None))
    )
    broken = StageState(GRAPH.stages["evaluate"], "current", (), None, verdict)
    said = describe_state([done, broken, state("merge", "waits")], False, "")
    assert said == ("✗ 2 limits broken", "✗ limits", "bold $error")


@pytest.mark.parametrize("width", [30, 60, 80, 120, 200])
async def test_the_header_fits_and_names_the_screen_shown(empty: Path, width: int) -> None:
    app = Workbench(empty / "params.yaml")
    async with app.run_test(size=(width, 24)) as pilot:
        await until(pilot, lambda: app.screen.query(Header))
        header = app.screen.query_one(Header)
        header.state = ("▶ finetune_lora 64% 0:12", "▶ lora 64%", "bold")
        header.facts = ("main", "cpu 1.1/23 GiB", "~/app")
        text = str(header.render())
        assert len(text) <= width or width == 30
        assert ("1 Pipe" in text and "64%" in text) or width == 30
        assert ("8 Mon" in text) == (width >= 80)  # the screens are named, and what runs is
        assert ("~/app" in text) == (width >= 200)
