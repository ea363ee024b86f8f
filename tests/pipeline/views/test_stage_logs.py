"""The pipeline's log by stage."""

from pathlib import Path

import pytest

from pipeline.project.logs.run_state import Journal
from pipeline.views import stage_logs
from pipeline.views.stage_logs import ALL, LoggedStep, StageLog, StageLogs, shown_line
from pipeline.views.stages import StageState
from tests.helpers.projects import STAGES

NAMES = ("pretrain", "finetune_lora", "probe_rank")
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
STEPS = "step,epoch,loss,learning_rate,grad_norm,tokens\n"


@pytest.fixture
def logs(tmp_path: Path) -> StageLogs:
    (tmp_path / "old.log").write_text(FIRST, encoding="utf-8")
    (tmp_path / "now.log").write_text(SECOND, encoding="utf-8")
    return StageLogs(tmp_path / "old.log", tmp_path / "now.log")


def printed(logs: StageLogs, stage: str) -> list[str]:
    return [*logs.read(stage, Path("no such folder"), NAMES).printed]


def test_lines_go_to_the_stage_that_printed_them_without_what_dvc_says(logs: StageLogs) -> None:
    assert printed(logs, "pretrain") == [
        "> lora pretrain",
        "pretrain         artifacts/base  loss 0.239",
    ]
    assert printed(logs, "probe_rank")[1:] == [
        "error: no data",
        "ERROR: failed to reproduce 'probe_rank': exited with 1",
    ]
    # A stage's own output cannot open the log of one that there is not.
    assert printed(logs, "finetune_lora") == [
        "> lora finetune lora",
        "Running stage 'no_such_stage':",
        "100%",
    ]
    assert printed(logs, "merge") == []


def test_a_new_run_replaces_the_log_of_the_stages_that_it_runs(
    logs: StageLogs, tmp_path: Path
) -> None:
    printed(logs, ALL)
    (tmp_path / "now.log").rename(tmp_path / "old.log")
    (tmp_path / "now.log").write_text(
        "Running stage 'pretrain':\n> lora pretrain\nagain\n", encoding="utf-8"
    )
    assert printed(logs, "pretrain") == ["> lora pretrain", "again"]
    assert printed(logs, "finetune_lora")[0] == "> lora finetune lora"
    assert printed(logs, ALL)[-3:] == ["Running stage 'pretrain':", "> lora pretrain", "again"]


def test_a_stage_that_prints_without_end_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_logs, "MAX_LINES", 10)
    path = tmp_path / "now.log"
    path.write_text(
        "Running stage 'pretrain':\n" + "x" * 300_000 + "\n" + "line\n" * 1000 + "last\n",
        encoding="utf-8",
    )
    lines = printed(StageLogs(path), ALL)
    assert lines[-1] == "last" and len(lines) == 10
    assert max(map(len, lines)) <= stage_logs.MAX_LENGTH


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
    path, logs = tmp_path / "loss.csv", StageLogs()

    def steps() -> list[LoggedStep]:
        return [*logs.read("pretrain", tmp_path, NAMES).steps]

    assert steps() == []
    path.write_text(f"{STEPS}1,1,5.14892,0.002,4.3,40\nnonsense\n2,1,", "utf-8")
    assert [step.line(40) for step in steps()] == ["step 1     epoch 1   loss 5.149"]
    assert steps()[0].line(120).endswith("learning rate 0.002    gradient 4.3")
    path.write_text(f"{STEPS}7,1,nan,0.002,4.3,40\n", "utf-8")
    assert [step.step for step in steps()] == [7]
    assert not logs.read("merge", tmp_path / "merge", NAMES).steps
    assert [step.step for step in steps()] == [7]


def test_notes_and_steps_stand_after_the_command_and_at_the_end_while_it_runs() -> None:
    log = StageLog("merge", ["> lora merge", "merged"], [LoggedStep(1, 1, 0.5, 0.1, 1.0)])
    run = Journal("done", 1, 0.0, notes=["merge: resumed", "done soon"])
    logged = ["… resumed", "… done soon", "step 1     epoch 1   loss 0.5"]
    done = StageState(STAGES["merge"], "current", (), run)
    assert log.lines(done, 40) == ["> lora merge", *logged, "merged"]
    running = StageState(STAGES["merge"], "running", (), run)
    assert log.lines(running, 40) == ["> lora merge", "merged", *logged]
    assert StageLog("merge", ["a library's warning"], log.steps).lines(None, 40)[0] == logged[2]
    assert StageLog(ALL, ["all"], log.steps).lines(done, 40) == ["all"]
