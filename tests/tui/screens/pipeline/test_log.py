"""The pipeline's log by stage, and the log's view: wrapped, searched, followed."""

from pathlib import Path
from typing import ClassVar

import pytest
from rich.cells import cell_len
from textual.app import App, ComposeResult

from tests.helpers.pilot import until
from tui.screens.pipeline import log
from tui.screens.pipeline.log import ALL, StageLogs, StepLog, shown_line
from tui.screens.pipeline.log_pane import LogPane, LogView, wrap_line

STAGES = ("pretrain", "finetune_lora", "probe_rank")
FIRST = """\
Stage 'expand_vocab' didn't change, skipping
Running stage 'pretrain':
> lora pretrain
pretrain         artifacts/base  loss 0.239
Updating lock file 'dvc.lock'

Running stage 'child/dvc.yaml:probe_rank':
> lora probe rank
error: no data
ERROR: failed to reproduce 'probe_rank': exited with 1
"""
SECOND = """\
Running stage 'finetune_lora':
> lora finetune lora
Running stage 'no_such_stage':
  1%\r 50%\r100%
"""


@pytest.fixture
def logs(tmp_path: Path) -> StageLogs:
    (tmp_path / "old.log").write_text(FIRST, encoding="utf-8")
    (tmp_path / "now.log").write_text(SECOND, encoding="utf-8")
    return StageLogs(tmp_path / "old.log", tmp_path / "now.log")


def test_lines_go_to_the_stage_that_printed_them_without_what_dvc_says(logs: StageLogs) -> None:
    assert logs.read(STAGES)
    assert logs.lines("pretrain") == [
        "> lora pretrain",
        "pretrain         artifacts/base  loss 0.239",
    ]
    assert logs.lines("probe_rank")[1:] == [
        "error: no data",
        "ERROR: failed to reproduce 'probe_rank': exited with 1",
    ]
    # A stage's own output cannot open the log of one that there is not.
    assert logs.lines("finetune_lora") == [
        "> lora finetune lora",
        "Running stage 'no_such_stage':",
        "100%",
    ]
    assert logs.lines("merge") == []
    assert not logs.read(STAGES)


def test_a_new_run_replaces_the_log_of_the_stages_that_it_runs(
    logs: StageLogs, tmp_path: Path
) -> None:
    logs.read(STAGES)
    (tmp_path / "now.log").rename(tmp_path / "old.log")
    (tmp_path / "now.log").write_text(
        "Running stage 'pretrain':\n> lora pretrain\nagain\n", encoding="utf-8"
    )
    assert logs.read(STAGES)
    assert logs.lines("pretrain") == ["> lora pretrain", "again"]
    assert logs.lines("finetune_lora")[0] == "> lora finetune lora"
    assert logs.lines(ALL)[-3:] == ["Running stage 'pretrain':", "> lora pretrain", "again"]


def test_a_stage_that_prints_without_end_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MAX_LINES", 10)
    path = tmp_path / "now.log"
    path.write_text(
        "Running stage 'pretrain':\n" + "x" * 300_000 + "\n" + "line\n" * 1000 + "last\n",
        encoding="utf-8",
    )
    logs = StageLogs(path)
    while logs.read(STAGES):
        pass
    assert logs.lines(ALL)[-1] == "last" and len(logs.lines(ALL)) == 10
    assert max(map(len, logs.lines(ALL))) <= log.MAX_LENGTH


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\tb", "a       b"),
        ("bell\x07", "bell␇"),
        ("\x1b", "␛"),
        ("old\rnew\r", "new"),
    ],
    ids=repr,
)
def test_a_line_is_shown_without_what_a_terminal_obeys(line: str, shown: str) -> None:
    assert shown_line(line) == shown


def test_steps_are_read_as_they_come_and_bad_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    steps = StepLog(tmp_path)
    assert not steps.read()
    path.write_text(
        "step,epoch,loss,learning_rate,grad_norm,tokens\n1,1,5.14892,0.002,4.3,40\nnonsense\n2,1,",
        "utf-8",
    )
    assert steps.read()
    assert [step.line(40) for step in steps.steps] == ["step 1     epoch 1   loss 5.149"]
    assert steps.steps[0].line(120).endswith("learning rate 0.002    gradient 4.3")
    path.write_text(
        "step,epoch,loss,learning_rate,grad_norm,tokens\n7,1,nan,0.002,4.3,40\n", "utf-8"
    )
    assert steps.read() and [step.step for step in steps.steps] == [7]


@pytest.mark.parametrize(
    "text", ["a b " * 40, "x" * 90, "狐狸" * 40, "ein satz mit 狐狸 " * 9, " " * 99], ids=ascii
)
def test_wrapped_parts_fit_and_lose_nothing(text: str) -> None:
    for width in (2, 7, 40):
        parts = wrap_line(text, width)
        assert "".join(parts) == text
        assert max(map(cell_len, parts)) <= width


class LogApp(App[None]):
    CSS: ClassVar[str] = "LogPane { height: 12; width: 40; }"

    def compose(self) -> ComposeResult:
        yield LogPane()


async def test_the_end_is_followed_until_the_user_scrolls_up() -> None:
    app = LogApp()
    async with app.run_test(size=(60, 20)) as pilot:
        pane, view = app.query_one(LogPane), app.query_one(LogView)
        view.focus()
        for count in (50, 90, 20):  # fewer too, as when a run begins anew
            pane.show("lora", [f"line {n}" for n in range(count)])
            await until(pilot, lambda: view.scroll_y == view.max_scroll_y > 0)
            assert view.follows
        await pilot.press("up")
        assert not view.follows
        pane.show("lora", [f"line {n}" for n in range(60)])
        await pilot.pause()
        assert view.scroll_y < 20
        await pilot.press("end")
        await until(pilot, lambda: view.scroll_y == view.max_scroll_y)
        pane.show("other", ["one line"])
        assert view.follows


async def test_matches_are_gone_through_and_counted() -> None:
    app = LogApp()
    async with app.run_test(size=(60, 20)) as pilot:
        pane, view = app.query_one(LogPane), app.query_one(LogView)
        view.focus()
        pane.show("lora", [f"line {n}{' Error' * (n % 20 == 3)}" for n in range(60)])
        pane.filtered("ERROR")
        assert view.found == 43 and "3 of 3" in str(pane.border_title)
        await pilot.press("n")
        assert view.found == 3 and "1 of 3" in str(pane.border_title)
        await until(pilot, lambda: view.scroll_y <= 3)
        await pilot.press("N", "N")
        assert view.found == 23
        pane.filtered("")
        assert "of" not in str(pane.border_title).replace("Log of", "")


async def test_all_lines_are_copied() -> None:
    app = LogApp()
    async with app.run_test(size=(60, 20)) as pilot:
        app.query_one(LogView).focus()
        app.query_one(LogPane).show("lora", ["one", "[b]two"])
        await pilot.press("y")
        assert app.clipboard == "one\n[b]two"
