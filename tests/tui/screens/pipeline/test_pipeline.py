"""The pipeline screen, on projects that change while it is open."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace
from textual.containers import VerticalScroll
from textual.pilot import Pilot
from textual.widget import Widget
from textual.widgets import Input, Static

from pipeline.files import artifact
from pipeline.project.stage_graph import Lazily, Project
from pipeline.project.status import StageState, Status
from pipeline.stages.methods.full import FinetuneFull
from pipeline.workbench import GRAPH
from tests.helpers.pilot import until
from tests.helpers.projects import BRIEF, METHODS, PIPELINE, SHIPPED, STAGES, load, make, save
from tui.app import Workbench
from tui.screens.pipeline.dag import DagView
from tui.screens.pipeline.panels import LINES, LogView, ParamForm, StageList
from tui.screens.pipeline.screen import PipelineScreen
from tui.services import pipeline_process
from tui.widgets.form import FieldInput, format_value, parse_names

Opened = tuple[Pilot[None], PipelineScreen]


@asynccontextmanager
async def open_screen(root: Path, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Opened]:
    app = Workbench(root / "params.yaml")
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, PipelineScreen)
        await until(pilot, lambda: bool(screen.states) or screen.query_one("#problem").display)
        yield pilot, screen


def lines(screen: PipelineScreen) -> list[str]:
    return [re.sub(" {2,}", "  ", str(option.prompt)) for option in screen.query_one(StageList).options]


def model_lines(screen: PipelineScreen) -> list[str]:
    """The lines of the stages that make models; the fixture `project` has not run the others."""
    return lines(screen)[: len(PIPELINE)]


def line(screen: PipelineScreen, stage: str) -> str:
    return next(line for line in lines(screen) if line.split()[1] == stage)


def message_text(screen: PipelineScreen) -> str:
    return "\n".join(text for _, _, text in screen.workbench.message_history)


def brief_params(root: Path) -> None:
    """Write the params that the fixture was made with."""
    given = (setting.partition("=") for setting in BRIEF)
    save(root / "params.yaml", {key: yaml.safe_load(value) for key, _, value in given})


def printed(screen: PipelineScreen, text: str) -> bool:
    return text in [line.text.rstrip() for line in screen.query_one(LogView).lines]


async def choose(pilot: Pilot[None], screen: PipelineScreen, stage: str) -> None:
    screen.query_one(StageList).highlighted = list(SHIPPED).index(stage)
    await until(pilot, lambda: screen.query_one(ParamForm).stage == stage)


def field(screen: PipelineScreen, key: str) -> Input:
    return screen.query_one(f"ParamForm #{key}", Input)


def line_of(editor: Widget) -> Widget:
    """The line of a field, which has its marks."""
    assert isinstance(editor.parent, Widget)
    return editor.parent


async def typed(pilot: Pilot[None], screen: PipelineScreen, key: str, text: str) -> None:
    field(screen, key).focus()
    field(screen, key).value = text
    await pilot.pause()


async def test_an_empty_project_says_what_is_missing_and_what_to_press(empty: Path) -> None:
    async with open_screen(empty) as (_, screen):
        assert line(screen, "pretrain") == "○ pretrain  not made yet"
        assert line(screen, "merge") == "○ merge  not made yet: needs expand_vocab, finetune_lora"
        assert "press r" in str(screen.query_one("#notes", Static).content)
        assert "Nothing was evaluated yet" in str(screen.query_one("#changes", Static).content)


@pytest.mark.parametrize("more", [0, 1])
async def test_stages_side_by_side_leave_the_panes_their_rows_and_the_list_scrolls(
    empty: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    others = ("finetune_another", "finetune_a_third", "finetune_a_fourth")[:more]
    stages_of = {**SHIPPED, **{name: replace(STAGES["finetune_full"], name=name) for name in others}}
    sections = {**GRAPH.sections, **dict.fromkeys(others, FinetuneFull)}
    monkeypatch.setitem(vars(GRAPH), "stages", Lazily(stages_of, dict))  # a frozen dataclass caches them there
    monkeypatch.setitem(vars(GRAPH), "sections", Lazily(sections, dict))
    monkeypatch.setattr(Project, "readable", stages_of)
    monkeypatch.setattr(Status, "of", lambda *_: {n: StageState(s, "missing", (), None) for n, s in stages_of.items()})
    async with open_screen(empty) as (pilot, screen):
        picture, stages, panes = screen.query_one(DagView), screen.query_one(StageList), screen.query_one("#panes")
        for size in ((80, 24), (80, 20), (60, 16)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert picture.display == (size[1] >= 20 + more), size
            assert not picture.display or (picture.region.width <= 80 and picture.region.height == 8 + more), size
            assert panes.region.height >= 6 and panes.region.bottom == size[1] - 1, size
            for number in (len(stages_of) - more - 1, 0):  # evaluate, then the first
                stages.highlighted = number
                await pilot.pause()
                assert stages.scroll_offset.y <= number < stages.scroll_offset.y + stages.size.height, size


async def test_a_finished_project_is_up_to_date_and_a_change_of_its_params_is_seen(project: Path) -> None:
    brief_params(project)
    async with open_screen(project) as (pilot, screen):
        await until(pilot, lambda: all("up to date" in line for line in model_lines(screen)))
        save(project / "params.yaml", {"finetune_lora.rank": 2})
        await until(pilot, lambda: "changed: rank 4 → 2" in line(screen, "finetune_lora"))
        assert line(screen, "merge") == "◌ merge  will run again: after finetune_lora"
        picture = screen.query_one(DagView)
        assert "● finetune_lora" in str(picture.render())


async def test_the_line_of_evaluate_says_whether_limits_are_kept(project: Path) -> None:
    brief_params(project)
    save(project / "params.yaml", {"evaluate.limits": {"answers_kept": 1.0, "variants": ["lora"]}})
    make(project, ["evaluate"])
    async with open_screen(project) as (pilot, screen):
        await until(pilot, lambda: "up to date: gate failed: 1 limit" in line(screen, "evaluate"))
        save(project / "params.yaml", {"evaluate.limits": {"answers_kept": 0.0}})
        await until(pilot, lambda: "changed: limits" in line(screen, "evaluate"))


async def test_a_param_is_checked_while_one_types_and_written_on_enter(project: Path) -> None:
    path = project / "params.yaml"
    before = path.read_text(encoding="utf-8")
    async with open_screen(project) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        await typed(pilot, screen, "rank", "0")
        rule = screen.query_one("#rule", Static)
        assert "finetune_lora.rank must be at least 1, got 0" in str(rule.content)
        assert line_of(field(screen, "rank")).has_class("-bad")
        await pilot.press("enter")
        assert path.read_text(encoding="utf-8") == before
        await pilot.press("ctrl+r")
        assert field(screen, "rank").value == "4" and not line_of(field(screen, "rank")).has_class("-edited")
        await typed(pilot, screen, "rank", "8")
        assert "Enter writes it" in str(rule.content)
        await pilot.press("enter")
        await until(pilot, lambda: load(path).finetune_lora.rank == 8)
        assert path.read_text(encoding="utf-8") == before.replace("  rank: 4", "  rank: 8", 1)
        await until(pilot, lambda: any("rank 4 → 8" in line for line in lines(screen)))
        assert not line_of(field(screen, "rank")).has_class("-edited")


KINDS: tuple[tuple[str, str, str, object], ...] = (
    ("expand_vocab", "data", "[data/finetune.de.txt]", ("data/finetune.de.txt",)),
    ("expand_vocab", "data", "", ()),
    ("expand_vocab", "tokens", "euro, [INST], [/INST]", ("euro", "[INST]", "[/INST]")),
    ("finetune_lora", "target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
    ("finetune_lora", "learning_rate", "1e-4", 1e-4),
    ("finetune_lora", "train_embeddings", "new_rows", "new_rows"),
    ("finetune_lora", "rank_pattern", "v_proj: 8, '.*[01].q_proj': 2", {"v_proj": 8, ".*[01].q_proj": 2}),
    ("finetune_lora", "alpha_pattern", "{v_proj: 1e-1}", {"v_proj": 0.1}),
    ("finetune_lora", "retention_data", "data/keep.txt", "data/keep.txt"),
    ("finetune_lora", "gradient_checkpointing", "selective", "selective"),
    ("finetune_lora", "data", "a b.csv, {path: c.txt, weight: 0.5}", ("a b.csv", {"path": "c.txt", "weight": 0.5})),
    ("finetune_lora", "data", "data/saved", "data/saved"),
    ("finetune_lora", "columns", "prompt: question", {"prompt": "question"}),
    ("pretrain", "tie_embeddings", "true", True),
)


async def test_every_kind_of_value_is_written(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        for stage, key, text, value in KINDS:
            await choose(pilot, screen, stage)
            await until(pilot, lambda key=key: not line_of(field(screen, key)).has_class("-edited"))  # type: ignore[misc]
            await typed(pilot, screen, key, text)
            await pilot.press("enter")
            await until(pilot, partial(is_written, empty, stage, key, value))


def is_written(root: Path, stage: str, key: str, value: object) -> bool:
    return bool(getattr(getattr(load(root / "params.yaml"), stage), key) == value)


async def test_a_text_that_may_be_empty_is_cleared_and_one_that_may_not_is_refused(empty: Path) -> None:
    path = empty / "params.yaml"
    save(path, {"finetune_lora.retention_data": "data/keep.txt"})
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        assert field(screen, "retention_data").value == "data/keep.txt"
        await typed(pilot, screen, "retention_data", "")
        assert "retention_data: a text, or empty" in str(screen.query_one("#rule", Static).content)
        await pilot.press("enter")
        await until(pilot, lambda: load(path).finetune_lora.retention_data == "")
        assert "  retention_data: ''" in path.read_text(encoding="utf-8")
        assert "finetune_lora.retention_data: (empty) saved to params.yaml" in message_text(screen)
        await typed(pilot, screen, "data", "")
        await pilot.press("enter")
        assert "finetune_lora.data must be a file or folder, or a list of them" in str(
            screen.query_one("#rule", Static).content
        )


@pytest.mark.parametrize(
    "values", [(), ("a",), ("a b", " euro"), ("[INST]", "a,b", '"', "'", "#", "a: b", "-", "\n", "ß🤗", "on", "1")]
)
def test_names_round_trip(values: tuple[str, ...]) -> None:
    assert parse_names(format_value(values)) == list(values)


def seen(form: ParamForm, field: Input) -> bool:
    """Whether the field is completely visible."""
    return form.query_one(VerticalScroll).region.contains_region(field.region)


async def test_the_grid_of_a_sweep_is_edited_as_it_stands_in_the_file(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "finetune_sweep")
        grid = field(screen, "grid")
        grid.focus()
        await pilot.pause()
        rule = screen.query_one("#rule", Static)
        assert grid.value == "rank: [1, 2, 4, 8]"
        assert "Enter writes it" not in str(rule.content), "nothing was typed"
        for text, problem in (
            ("rank: 4", "finetune_sweep.grid.rank must be a list of values, such as [1, 2], or a range"),
            ("rank: [0]", "finetune_sweep.grid.rank must be at least 1, got 0"),
            ("rnk: [1]", "finetune_sweep.grid.rnk: adapters that train together can differ in seed, "),
            ("rank: [1, 2", "finetune_sweep.grid must be a mapping of keys to lists of values"),
        ):
            await typed(pilot, screen, "grid", text)
            assert problem in str(rule.content)
            await pilot.press("enter")
        assert not screen.workbench.message_history
        await typed(pilot, screen, "grid", "rank: [2, 4], learning_rate: [1e-3, 0.002]")
        await pilot.press("enter")
        await until(pilot, lambda: screen.workbench.message_history)
        assert "finetune_sweep.grid: rank: [2, 4], learning_rate: [0.001, 0.002] saved to params.yaml" in message_text(
            screen
        )
        assert load(empty / "params.yaml").finetune_sweep.grid == {"rank": (2, 4), "learning_rate": (0.001, 0.002)}
        await until(pilot, lambda: not line_of(grid).has_class("-edited"))


@pytest.mark.parametrize(
    ("keys", "every"),
    [
        (("tab", "up"), 4),
        pytest.param(("tab", "shift+tab"), 1, marks=pytest.mark.slow),
        pytest.param(("down", "up"), 1, marks=pytest.mark.slow),
    ],
)
async def test_every_param_is_reached_by_keys_and_seen_while_it_is_edited(
    empty: Path, keys: tuple[str, str], every: int
) -> None:
    """Of the longest form, on the smallest terminal, also while a message below takes some of its lines.

    One in `every` fields is edited, and the way back is shorter by the same factor.
    """
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        await pilot.press("p")
        form, reached = screen.query_one(ParamForm), list[str | None]()
        fields = list(form.form.editors.values())
        there = len(fields) - 1
        back = there // every
        for number, key in enumerate([keys[0]] * there + [keys[1]] * back):
            focused = screen.focused
            assert isinstance(focused, FieldInput)
            original = focused.value
            reached.append(focused.id)
            if number % every == 0:
                focused.value = "?" * 60
                await pilot.pause()
            await until(pilot, partial(seen, form, focused))
            focused.value = original
            await pilot.press(key)
        assert reached[:there] == [field.id for field in fields[:-1]]
        assert reached[there:] == [field.id for field in fields[:0:-1]][:back]
        assert screen.focused is fields[there - back] and len(fields) > 20


async def test_params_and_each_state_are_there_before_all_files_are_hashed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, real = threading.Event(), artifact.verify

    def slow(folder: Path) -> dict[str, Any]:
        if folder.name == "full_finetuned":
            hold.wait(30)
        return real(folder)

    monkeypatch.setattr(artifact, "verify", slow)
    brief_params(project)
    app = Workbench(project / "params.yaml")
    try:
        async with app.run_test(size=(80, 24)) as pilot:
            screen = app.screen
            assert isinstance(screen, PipelineScreen)
            await until(pilot, lambda: "expand_vocab  up to date" in line(screen, "expand_vocab"))
            assert line(screen, "finetune_full") == "· finetune_full  …" and not screen.states
            assert field(screen, "d_model").value == "64"
            await choose(pilot, screen, "finetune_lora")
            assert field(screen, "rank").value == "4"
            hold.set()
            await until(pilot, lambda: all("up to date" in line for line in model_lines(screen)))
    finally:
        hold.set()


async def test_a_base_that_is_missing_says_so_and_is_seen_when_it_comes(empty: Path) -> None:
    save(empty / "params.yaml", {"base": "./models/mine"})
    async with open_screen(empty) as (pilot, screen):
        await until(pilot, lambda: "not made yet: base must be minigpt" in line(screen, "import"))
        (empty / "models/mine").mkdir(parents=True)
        (empty / "models/mine/notes.txt").touch()
        await until(pilot, lambda: "it has no config.json" in line(screen, "import"))
        (empty / "models/mine/config.json").write_text("{}", encoding="utf-8")
        await until(pilot, lambda: "has no model.safetensors" in line(screen, "import"))
        (empty / "models/mine/model.safetensors").touch()
        await until(pilot, lambda: line(screen, "import") == "○ import  not made yet")


async def test_the_base_is_a_field_of_the_stage_that_imports_it(empty: Path) -> None:
    save(empty / "params.yaml", {"base": "./models/mine"})
    async with open_screen(empty) as (pilot, screen):
        for key, text, value in (("base", "org/model@main", "org/model@main"), ("trust_remote_code", "true", True)):
            await typed(pilot, screen, key, text)
            await pilot.press("enter")
            await until(pilot, lambda k=key, v=value: getattr(load(empty / "params.yaml").origin, k) == v)  # type: ignore[misc]


async def test_garbage_in_a_field_is_one_line(empty: Path) -> None:
    before = (empty / "params.yaml").read_bytes()
    async with open_screen(empty) as (pilot, screen):
        rule = screen.query_one("#rule", Static)
        for text in ("", " ", "[", "{", "nan", "1:30", "0x10", "5.0", "x: y", "9" * 30, "ß", "&a", "2026-99-99"):
            await typed(pilot, screen, "epochs", "60")
            assert "pretrain.epochs must be" not in str(rule.content), text
            await typed(pilot, screen, "epochs", text)
            await pilot.press("enter")
            assert "pretrain.epochs must be" in str(rule.content), text
    assert (empty / "params.yaml").read_bytes() == before


async def test_escape_takes_back_and_leaving_a_stage_says_what_was_not_written(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await typed(pilot, screen, "epochs", "7")
        await pilot.press("escape")
        assert field(screen, "epochs").value == "60"
        assert screen.query_one(StageList).has_focus
        await typed(pilot, screen, "epochs", "7")
        await choose(pilot, screen, "merge")
        assert "Not saved: pretrain.epochs: 7" in message_text(screen)


async def test_a_change_by_hand_shows_but_not_over_what_is_being_typed(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await typed(pilot, screen, "epochs", "7")
        save(empty / "params.yaml", {"pretrain.epochs": 9, "pretrain.seed": 3})
        await until(pilot, lambda: field(screen, "seed").value == "3")
        assert field(screen, "epochs").value == "7"


async def test_params_broken_by_hand_are_reported_and_mended(empty: Path) -> None:
    path = empty / "params.yaml"
    text = path.read_text(encoding="utf-8")
    async with open_screen(empty) as (pilot, screen):
        banner = screen.query_one("#problem", Static)
        path.write_text("pretrain: [", encoding="utf-8")
        await until(pilot, lambda: bool(banner.display))
        assert "is not valid YAML" in str(banner.content)
        await typed(pilot, screen, "epochs", "7")
        await pilot.press("enter")
        assert path.read_text(encoding="utf-8") == "pretrain: ["
        path.write_text(text, encoding="utf-8")
        await until(pilot, lambda: not banner.display)


async def test_it_opens_on_a_broken_and_on_a_missing_file(empty: Path, tmp_path: Path) -> None:
    (empty / "params.yaml").write_text("pretrain: [", encoding="utf-8")
    async with open_screen(empty) as (pilot, screen):
        assert "is not valid YAML" in str(screen.query_one("#problem", Static).content)
        await pilot.press("s", "r", "x", "p", "l", "m", "down")
    async with open_screen(tmp_path) as (pilot, screen):
        assert "does not exist" in str(screen.query_one("#problem", Static).content)
        await pilot.press("s", "p", "enter")


async def test_a_full_disk_while_saving_is_one_toast(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (empty / "params.yaml").read_bytes()
    async with open_screen(empty) as (pilot, screen):

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        await typed(pilot, screen, "epochs", "7")
        await pilot.press("enter")
        await until(pilot, lambda: "No space left" in message_text(screen))
    assert (empty / "params.yaml").read_bytes() == before


async def test_stages_are_chosen_by_key_and_mouse_and_panes_by_key(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await pilot.press("down", "down", "down")
        await until(pilot, lambda: screen.chosen == "finetune_full")
        position = screen.query_one(DagView)._layout.positions["merge"]
        await pilot.click(DagView, offset=(position.column + 2, position.row))
        await until(pilot, lambda: screen.chosen == "merge")
        assert screen.query_one(ParamForm).stage == "merge"
        for key, pane in (("l", "log"), ("m", "metrics"), ("p", "params")):
            await pilot.press("escape", key)
            await pilot.pause()
            assert [str(one.id) for one in screen.query(".pane") if one.display] == [pane]
            assert screen.focused is not None
            assert screen.query_one(f"#{pane}") in (screen.focused, *screen.focused.ancestors)


async def test_params_stay_beside_another_pane_where_there_is_room(empty: Path) -> None:
    async with open_screen(empty, (120, 40)) as (pilot, screen):
        for key, panes in (("p", ["params", "log"]), ("m", ["params", "metrics"]), ("p", ["params", "metrics"])):
            await pilot.press("escape", key)
            await pilot.pause()
            assert [str(one.id) for one in screen.query(".pane") if one.display] == panes


async def test_a_run_without_a_pipeline_and_a_stage_without_inputs_are_refused(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await pilot.press("r")
        assert "has no dvc.yaml" in message_text(screen)
        await choose(pilot, screen, "merge")
        await pilot.press("s")
        assert "merge needs expand_vocab, finetune_lora first" in message_text(screen)
        await pilot.press("x")
        assert "Nothing is running" in message_text(screen)


@pytest.fixture
def dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace dvc by a Python program."""

    def install(code: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/dvc").write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
        (tmp_path / "bin/dvc").chmod(0o755)

    monkeypatch.setattr(pipeline_process, "BIN", tmp_path / "bin")
    return install


async def test_a_run_is_started_with_the_right_words_and_stopped(
    studied: Path, tmp_path: Path, dvc: Callable[[str], None]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(studied, project)
    (project / "dvc.yaml").write_text("", encoding="utf-8")
    brief_params(project)
    dvc("import sys, time\nprint('called', *sys.argv[1:], flush=True)\ntime.sleep(60)")
    async with open_screen(project, (200, 40)) as (pilot, screen):
        runner = screen.workbench.runner
        for key, words in (
            ("r", "repro"),
            ("s", "repro --single-item finetune_lora"),
            ("S", "repro --single-item --force finetune_lora"),
        ):
            await choose(pilot, screen, "finetune_lora")
            await pilot.press("escape", key)
            await until(pilot, partial(printed, screen, f"called {words}"))
            await pilot.press("r")
            assert "already running" in message_text(screen)
            await pilot.press("x")
            await until(pilot, lambda: runner.running() is None)
        await until(pilot, lambda: "All stages are up to date" in message_text(screen))


async def test_a_failed_stage_shows_why_and_is_chosen(project: Path, dvc: Callable[[str], None]) -> None:
    """A real stage fails: its message is shown, no matter who ran it."""
    (project / "dvc.yaml").write_text("", encoding="utf-8")
    brief_params(project)
    dvc(f"import subprocess\nsubprocess.run([{str(Path(sys.executable).parent / 'lora')!r}, 'finetune', 'freeze'])")
    async with open_screen(project) as (pilot, screen):
        save(project / "params.yaml", {"finetune_freeze.last_blocks": 9})
        await pilot.press("r")
        await until(pilot, lambda: "✗ finetune_freeze" in line(screen, "finetune_freeze"), 30)
        assert "failed: finetune_freeze.last_blocks must be at most 2" in line(screen, "finetune_freeze")
        await until(pilot, lambda: screen.chosen == "finetune_freeze")
        assert "last_blocks must be at most 2" in str(screen.query_one("#notes", Static).content)
        assert "finetune_freeze failed" in message_text(screen)


@pytest.mark.slow
async def test_a_stage_that_prints_100_mb_leaves_the_screen_alive(project: Path, dvc: Callable[[str], None]) -> None:
    (project / "dvc.yaml").write_text("", encoding="utf-8")
    dvc("line = 'x' * 99\nfor _ in range(1_000_000): print(line)\nprint('the last line', flush=True)")
    async with open_screen(project) as (pilot, screen):
        await pilot.press("r", "l")
        log = screen.query_one(LogView)
        await until(pilot, lambda: bool(log.lines) and "the last line" in log.lines[-1].text, 60)
        assert len(log.lines) <= LINES
        await choose(pilot, screen, "expand_vocab")
    assert (project / "runs/pipeline.log").stat().st_size > 100_000_000


async def test_a_run_elsewhere_is_followed(project: Path) -> None:
    brief_params(project)
    async with open_screen(project) as (pilot, screen):
        await until(pilot, lambda: "up to date" in line(screen, "finetune_lora"))
        save(project / "params.yaml", {"finetune_lora.epochs": 150})  # some seconds: a shorter run can end unseen
        lora = str(Path(sys.executable).parent / "lora")
        process = subprocess.Popen([lora, "finetune", "lora"], cwd=project, stderr=subprocess.DEVNULL)
        await until(
            pilot, lambda: "% " in line(screen, "finetune_lora") and "left" in line(screen, "finetune_lora"), 30
        )
        assert "/900" in line(screen, "finetune_lora")
        await until(pilot, lambda: process.poll() is not None, 60)
        await until(pilot, lambda: line(screen, "finetune_lora") == "✓ finetune_lora  up to date")
        assert "measured at the peak" in str(await _notes_of(pilot, screen, "finetune_lora"))


async def _notes_of(pilot: Pilot[None], screen: PipelineScreen, stage: str) -> str:
    await choose(pilot, screen, stage)
    return str(screen.query_one("#notes", Static).content)


async def test_an_artifact_that_vanishes_is_missing(project: Path) -> None:
    brief_params(project)
    async with open_screen(project) as (pilot, screen):
        await until(pilot, lambda: "up to date" in line(screen, "merge"))
        shutil.rmtree(project / "artifacts/lora_merged")
        await until(pilot, lambda: line(screen, "merge") == "○ merge  not made yet")


async def test_metrics_are_compared_with_the_last_commit(project: Path) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A", "artifacts/evaluation"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=project, check=True)
    async with open_screen(project, (120, 40)) as (pilot, screen):
        changes = screen.query_one("#changes", Static)
        await until(pilot, lambda: "As in the last commit" in str(changes.content))
        save(project / "params.yaml", {"finetune_lora.rank": 2})
        make(project, ["finetune_lora", "merge", "evaluate"], [f"{name}.epochs=2" for name in _trained()])
        await until(pilot, lambda: "lora.trainable" in pilot_text(changes), 30)
        row = next(line for line in pilot_text(changes).splitlines() if "lora.trainable " in line)
        assert row.split() == ["lora.trainable", "16,768", "14,720", "-2048"]


def _trained() -> list[str]:
    return [
        "pretrain",
        "train_from_scratch",
        *(f"finetune_{method}" for method in METHODS if f"finetune_{method}" in PIPELINE),
    ]


def pilot_text(widget: Static) -> str:
    """The text of a widget that shows a table."""
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=100)
    console.print(widget.content)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()
