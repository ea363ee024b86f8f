"""A model that breaks evaluate.limits makes `lora evaluate` exit with 1, from the cache and under
DVC too; its badge is shown where exactly this model was measured."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.export.model_card import card
from pipeline.inference.catalog import measured
from pipeline.project.gate import RETAIN
from pipeline.project.new_project import write_project
from pipeline.stages.evaluate import _limited
from pipeline.stages.registry import open_project
from pipeline.views import models
from pipeline.views.stages import Status
from tests.conftest import Lora
from tests.helpers.json_files import read_json
from tests.helpers.projects import ROOT, folder_bytes, save

BROKEN = "evaluate.limits={answers_kept: 1.0, new_loss: 100, variants: [lora, full]}"
KEPT = (
    "evaluate.limits={answers_kept: 0.0, task_drop: 1.0, tasks: {currencies: 0.0}, variants: lora}"
)


@pytest.fixture
def limited(houses: Path, tmp_path: Path) -> Iterator[Path]:
    """A brief project with its tasks."""
    shutil.copytree(houses, tmp_path / "p", ignore=shutil.ignore_patterns("child"))
    yield tmp_path / "p"


def metrics(root: Path) -> dict[str, Any]:
    read: dict[str, Any] = read_json(root / "artifacts/evaluation/metrics.json")
    return read


def test_evaluate_exits_with_1_and_a_table_and_again_from_the_cache(
    limited: Path, cli: Lora
) -> None:
    before = metrics(limited)
    assert "gate" not in before
    code, out, err = cli("evaluate", "--set", BROKEN, cwd=limited)
    gate = metrics(limited)["gate"]
    assert (code, gate["passed"], gate["variants"]) == (1, False, ["lora", "full"])
    assert {(one["variant"], one["limit"], one["wanted"]) for one in gate["broken"]} <= {
        (variant, "answers_kept", 1.0) for variant in ("lora", "full")
    }
    assert err.endswith(
        f"error: evaluate.limits: {len(gate['broken'])} limits are broken, by lora, full. "
        f"{RETAIN}\n"
    )
    for one in gate["broken"]:
        assert any(line.split()[:2] == [one["variant"], one["limit"]] for line in out.splitlines())
    assert {name: metrics(limited)[name] for name in before} == before, (
        "the numbers are what they are"
    )
    made = folder_bytes(limited / "artifacts/evaluation")
    code, out, err = cli("evaluate", "--set", BROKEN, cwd=limited)
    assert (code, "taken from the cache" in err, "limits broken:" in out) == (1, True, True)
    assert folder_bytes(limited / "artifacts/evaluation") == made
    report = (limited / "artifacts/evaluation/report.md").read_text(encoding="utf-8")
    assert "**Limits broken:**" in report
    assert "| Full fine-tuning | answers_kept | at least 1 |" in report
    code, out, _ = cli("report", cwd=limited)
    assert (code, "limits broken:" in out) == (0, True), "to look at it is no failure"


@pytest.mark.slow
def test_an_adapter_beside_the_pipelines_is_judged_too(limited: Path, cli: Lora) -> None:
    """As a variant is: its tasks and the limits that it breaks are printed, and the command ends
    with 1.
    """
    shutil.copytree(limited / "artifacts/lora_adapter", limited / "artifacts/tried/copy")
    command = ("evaluate", "--adapter", "artifacts/tried/copy", "--set")
    code, out, err = cli(*command, BROKEN, cwd=limited)
    assert code == 1
    assert err.endswith(
        f"error: evaluate.limits: 1 limit is broken, by artifacts/tried/copy. {RETAIN}\n"
    )
    lines = [line.split() for line in out.splitlines()]
    assert ["artifacts/tried/copy", "answers_kept", "at", "least", "1"] in [
        line[:5] for line in lines
    ]
    for name in ("base", "artifacts/tried/copy"):
        assert ["currencies", name] in [line[:2] for line in lines]
    kept = KEPT.replace("variants: lora", "variants: full")
    code, out, _ = cli(*command, kept, cwd=limited)
    assert (code, "limits: kept by artifacts/tried/copy" in out) == (0, True), (
        "it is named, so it is judged"
    )
    heading, *rows = cli("adapters", cwd=limited)[1].splitlines()
    assert heading.startswith("adapter") and len(rows) == 2, "one table, also with the limits"
    assert "passed" in next(row for row in rows if row.startswith("tried/copy"))


@pytest.mark.slow
def test_the_verdict_is_that_of_the_adapters_that_are_named(limited: Path, cli: Lora) -> None:
    """The file has all that were measured, each with its verdict."""
    for name in ("one", "other"):
        shutil.copytree(limited / "artifacts/lora_adapter", limited / f"artifacts/tried/{name}")
    (limited / "artifacts/tried/other/README.md").write_text(
        "so that it has a digest of its own", encoding="utf-8"
    )
    (limited / "artifacts/tried/other/manifest.json").unlink()
    command = ("evaluate", "--set", BROKEN, "--adapter")
    assert cli(*command, "artifacts/tried/one", cwd=limited)[0] == 1
    code, out, _ = cli(*command, "artifacts/tried/other", "--json", cwd=limited)
    printed = json.loads(out)
    assert (code, printed["gate"]["variants"]) == (1, ["artifacts/tried/other"])
    assert {*printed} == {"base", "artifacts/tried/one", "artifacts/tried/other", "gate"}
    assert (
        printed["artifacts/tried/one"]["trainable"] > 0
        and "trainable" not in printed["artifacts/tried/other"]
    )
    file = read_json(limited / "artifacts/measured/metrics.json")
    assert file["gate"]["variants"] == ["artifacts/tried/one", "artifacts/tried/other"]


@pytest.mark.slow
def test_json_is_one_document_with_the_verdict(limited: Path, cli: Lora) -> None:
    code, out, err = cli("evaluate", "--json", "--set", BROKEN, cwd=limited)
    assert (code, json.loads(out)) == (1, metrics(limited))
    assert "error: evaluate.limits:" in err
    code, out, _ = cli("evaluate", "--json", cwd=limited)
    assert (code, "gate" in json.loads(out)) == (0, False)


@pytest.mark.parametrize(
    "command",
    [
        ("export", "ADAPTER", "--format", "peft", "--out", "out"),
        ("export", "ADAPTER", "--format", "merged", "--out", "out"),
        ("merge", "--adapter", "ADAPTER", "--out", "out"),
        ("push", "ADAPTER", "me/mine", "--base-name", "me/base", "--dry-run", "--out", "out"),
    ],
    ids=lambda command: " ".join(command[:4:3]),
)
@pytest.mark.slow
def test_what_ships_an_adapter_names_its_broken_limits(
    limited: Path, cli: Lora, command: tuple[str, ...]
) -> None:
    words = [word.replace("ADAPTER", "artifacts/lora_adapter") for word in command]
    cli("evaluate", "--set", BROKEN, cwd=limited)
    code, _, err = cli(*words, cwd=limited)
    assert code == 0
    assert "artifacts/lora_adapter breaks evaluate.limits: answers_kept 0." in err and RETAIN in err
    cli("evaluate", "--set", KEPT, cwd=limited)
    shutil.rmtree(limited / "out")
    code, _, err = cli(*words, cwd=limited)
    assert (code, "evaluate.limits" in err) == (0, False)


@pytest.mark.slow
def test_two_evaluations_give_the_same_bytes(limited: Path, cli: Lora) -> None:
    assert cli("evaluate", "--set", KEPT, cwd=limited)[0] == 0
    made = folder_bytes(limited / "artifacts/evaluation")
    assert cli("evaluate", "--set", KEPT, "--force", cwd=limited)[0] == 0
    assert folder_bytes(limited / "artifacts/evaluation") == made


@pytest.mark.slow
def test_the_badge_is_of_exactly_this_adapter(limited: Path, cli: Lora) -> None:
    adapter, full = limited / "artifacts/lora_adapter", limited / "artifacts/full_finetuned"

    def badges() -> list[str | None]:
        scores = measured([limited / "artifacts"])
        return [
            models.check(models.describe(folder), limited, scores).gate
            for folder in (adapter, full)
        ]

    assert badges() == [None, None]
    assert "gate" not in cli("adapters", cwd=limited)[1]
    assert cli("evaluate", "--set", KEPT, cwd=limited)[0] == 0
    assert badges() == ["passed", None], "full had none to keep"
    assert "gate, the limits that were set for it: passed\n" in card(adapter)
    assert "task currencies: score" in card(adapter)
    heading, row = cli("adapters", cwd=limited)[1].splitlines()
    assert ("gate" in heading, "passed" in row) == (True, True)
    cli("evaluate", "--set", BROKEN, cwd=limited)
    assert badges() == ["failed: 1 limit", "failed: 1 limit"]
    assert "gate, the limits that were set for it: failed: 1 limit (answers_kept 0." in card(
        adapter
    )
    assert json.loads(cli("adapters", "--json", cwd=limited)[1])[0]["gate"] == "failed: 1 limit"
    assert (
        cli("finetune", "lora", "--set", "finetune_lora.seed=5", cwd=limited)[0] == 0
    )  # another adapter, not measured
    assert badges() == [None, "failed: 1 limit"]
    assert "gate" not in card(adapter)


@pytest.mark.slow
def test_the_state_of_the_stage_says_whether_limits_are_kept(limited: Path, cli: Lora) -> None:
    def state() -> tuple[str, tuple[str, ...]]:
        now = Status().of(open_project(limited / "params.yaml"))["evaluate"]
        assert (now.broken is not None) == any("failed" in reason for reason in now.reasons)
        return now.state, now.reasons

    save(limited / "params.yaml", {"evaluate.limits": {"answers_kept": 1.0, "variants": ["lora"]}})
    assert cli("evaluate", cwd=limited)[0] == 1
    assert state() == ("current", ("gate failed: 1 limit",))
    tasks = limited / "data/tasks.de.yaml"
    tasks.write_text(
        tasks.read_text(encoding="utf-8").replace("answer: bett", "answer: sofa"), encoding="utf-8"
    )
    assert state() == ("changed", ("data/tasks.de.yaml changed",))


@pytest.mark.slow
def test_dvc_repro_fails_and_keeps_what_was_measured_until_the_limits_are_kept(
    limited: Path,
) -> None:
    params = limited / "params.yaml"
    save(params, {"evaluate.limits": {"answers_kept": 1.0, "variants": ["lora"]}})
    write_project(open_project(params), params.read_text(encoding="utf-8"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "evaluate"]

    def repro() -> tuple[bool, str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
        done = subprocess.run(
            command, cwd=limited, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode == 0, done.stdout + done.stderr

    for _ in range(2):  # again, as DVC locks no stage that failed
        ended_well, said = repro()
        assert (ended_well, "answers_kept  at least 1" in said) == (False, True), said
        assert "error: evaluate.limits: 1 limit is broken, by lora." in said
        assert not metrics(limited)["gate"]["passed"]
    save(params, {"evaluate.limits": {"answers_kept": 0.0, "variants": ["lora"]}})
    assert repro()[0]
    ended_well, said = repro()
    assert (ended_well, "didn't change, skipping" in said) == (True, True)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (
            "{new_loss: 1, variants: [lora, lroa]}",
            "evaluate.limits.variants: lroa is not a trained variant of this project",
        ),
        (
            "{new_loss: 1, variants: base}",
            "evaluate.limits.variants: base is not a trained variant of this project",
        ),
        (
            "{tasks: {capital: 1}}",
            "evaluate.limits.tasks: there is no task 'capital'. evaluate.tasks has old sentences, "
            "new",
        ),
    ],
)
def test_a_limit_that_could_never_count_is_refused(
    limited: Path, cli: Lora, limits: str, said: str
) -> None:
    code, out, err = cli("evaluate", "--set", f"evaluate.limits={limits}", cwd=limited)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {said}")


def test_where_nothing_trains_no_variant_can_be_limited(tmp_path: Path) -> None:
    limits = "{new_loss: 1, variants: lora}"
    (tmp_path / "params.yaml").write_text(
        f"pretrain: {{}}\nevaluate: {{new_data: x.txt, limits: {limits}}}\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"lora is not a trained variant .* It has none\.$"):
        _limited(open_project(tmp_path / "params.yaml"), [], [])


@pytest.mark.slow
def test_a_scorer_is_part_of_the_inputs(limited: Path, cli: Lora) -> None:
    task = '{"name": "mine", "kind": "python", "scorer": "mine.py", "examples": [{"prompt": "der zug"}]}\n'
    (limited / "data/mine.jsonl").write_text(task, encoding="utf-8")
    (limited / "data/mine.py").write_text(
        "def score(answer, example):\n    return 0.25\n", encoding="utf-8"
    )
    files = "evaluate.tasks=[data/mine.jsonl, data/mine.py]"
    assert cli("evaluate", "--set", files, cwd=limited)[0] == 0
    assert metrics(limited)["lora"]["tasks"]["mine"]["score"] == 0.25
    (limited / "data/mine.py").write_text(
        "def score(answer, example):\n    return 0.75\n", encoding="utf-8"
    )
    assert cli("evaluate", "--set", files, cwd=limited)[0] == 0
    assert metrics(limited)["lora"]["tasks"]["mine"]["score"] == 0.75
