"""What is said of a stage: in its row, and in its facts."""

import os
from collections.abc import Mapping, Sequence
from typing import get_args

from textual.app import App, ComposeResult

from pipeline.project.gate import Broken, Verdict
from pipeline.project.logs.run_state import Journal
from pipeline.project.stage_graph import Stage
from pipeline.views.stage_tree import stage_rows
from pipeline.views.stages import StageState, State
from tests.helpers.projects import STAGES
from tests.helpers.stages import NEEDS, PROBES, SHOWN
from tui.screens.pipeline.stages import (
    MUTED,
    SIGNS,
    draw_facts,
    facts,
    look_of,
)
from tui.screens.pipeline.tree import StageTree, brief, words_cell
from tui.services.pipeline_process import Running


class TreeApp(App[None]):
    """The tree alone."""

    CSS = "Table { scrollbar-size-vertical: 0; }"

    def __init__(self) -> None:
        super().__init__()
        self.table = StageTree()

    def compose(self) -> ComposeResult:
        yield self.table


async def drawn(
    stages: Mapping[str, Stage],
    needs: Mapping[str, Sequence[str]],
    states: Mapping[str, StageState],
    width: int,
) -> list[str]:
    app = TreeApp()
    async with app.run_test(size=(width, 30)) as pilot:
        app.table.show(stage_rows(stages, needs, states))
        await pilot.pause()
        return app.table.texts()


async def line(
    state: State, width: int, reasons: tuple[str, ...] = (), run: Journal | None = None
) -> str:
    """The row of a stage in this state."""
    stages = {"finetune_lora": STAGES["finetune_lora"]}
    states = {"finetune_lora": StageState(STAGES["finetune_lora"], state, reasons, run)}
    (text,) = await drawn(stages, {"finetune_lora": ()}, states, width)
    return text


async def test_what_a_row_says_of_each_state() -> None:
    done = Journal("done", 1, 100.0, ended=109.0)
    running = Journal("running", 1, 0.0, done=128, total=200, rate=6.0)
    assert await line("current", 30, (), done) == "✓ lora                     9 s"
    assert await line("changed", 30, ("rank 4 → 16",), done) == "● lora rank 4 → 16         9 s"
    # the reason rather than the time
    assert await line("changed", 20, ("rank 4 → 16",), done) == "● lora rank 4 → 16"
    assert await line("changed", 16, ("rank 4 → 16",), done) == "● lora rank 4 →…"
    assert await line("running", 40, (), running) == "▶ lora 64% ━━━━━╌╌╌ 12 s left"
    assert await line("running", 20, (), running) == "▶ lora 64% ━━━━━╌╌╌…"
    assert await line("running", 40) == "▶ lora starting"
    assert await line("missing", 40, ("needs expand_vocab",)) == "○ lora not made"
    problem = ("base must be minigpt",)
    assert await line("missing", 60, problem) == "○ lora not made: base must be minigpt"
    problem = ("rank must be at least 1",)
    assert await line("failed", 60, problem) == "✗ lora failed: rank must be at least 1"
    assert await line("current", 40, ("gate passed",)) == "✓ lora gate passed"


async def test_the_group_is_folded_and_says_what_needs_attention_most() -> None:
    states = {name: StageState(stage, "current") for name, stage in SHOWN.items()}
    run = Journal("running", 1, 0.0, 5, 10)
    states["probe_size"] = StageState(PROBES["probe_size"], "running", (), run)
    texts = await drawn(SHOWN, NEEDS, states, 60)
    assert "▶   ├ ▸ probes   1/2  ▶ size 50% ━━━━╌╌╌╌" in texts
    assert not any("norm" in text for text in texts)
    assert "✓   └ overview   after sweep, evaluate, probes" in texts


async def test_rows_of_any_state_are_no_wider_than_the_pane() -> None:
    for state in get_args(State):
        states = {name: StageState(each, state, ("because " * 9,)) for name, each in SHOWN.items()}
        for width in (30, 40, 80):
            texts = await drawn(SHOWN, NEEDS, states, width)
            assert max(map(len, texts)) <= width, (state, width)


def test_a_stage_whose_models_break_limits_is_red_though_it_is_up_to_date() -> None:
    verdict = Verdict(("lora",), (Broken("lora", "new_loss", 1.0, 2.0),))
    stage = STAGES["evaluate"]
    state = StageState(stage, "current", ("gate failed: 1 limit",), None, verdict)
    (row,) = stage_rows({"evaluate": stage}, {"evaluate": ()}, {"evaluate": state})
    text = words_cell(row)
    assert text.plain == "gate failed: 1 limit"
    assert {str(span.style) for span in text.spans} == {SIGNS["failed"][1]}
    assert look_of(state) == SIGNS["failed"] != (MUTED, "")


def test_times_take_five_cells() -> None:
    assert [brief(s) for s in (0.2, 1, 59.4, 60, 125, 3599, 3600, 12345)] == [
        *("<1 s", "1 s", "59 s", "1:00", "2:05", "59:59", "1h00", "3h25"),
    ]


def test_who_started_a_run() -> None:
    state = StageState(STAGES["merge"], "running", (), Journal("running", 77, 0.0))

    def said(running: Running | None) -> str:
        return next(text for label, text, _ in facts(state, running, ()) if label == "run")

    mine = Running(5, "dvc repro", 0.0, os.getpid())
    assert said(mine).startswith("here as dvc repro, process 5, since ")
    other = Running(5, "dvc repro", 0.0, 12345678)
    assert said(other).startswith("by another workbench, process 12345678, as dvc repro, process 5")
    assert said(None).startswith("in a terminal or by another program: process 77, since ")


def test_facts_are_wrapped_beside_their_label_which_is_written_once() -> None:
    rows = [("why", "one reason", ""), ("why", "another that is long", ""), ("run", "done", "")]
    assert [text.plain for text in draw_facts(rows, 20)] == [
        "why  one reason",
        "     another that is",
        "     long",
        "run  done",
    ]
