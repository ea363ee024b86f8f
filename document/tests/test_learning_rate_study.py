"""The study of LoRA Without Regret: its numbers are those of runs of their own, on MiniGPT and on
an imported base.
"""

import json
from pathlib import Path

import pytest
from lab.claims.check import Row, verdicts
from lab.studies.learning_rate import ALL, ATTENTION, FEED_FORWARD, FULL
from lab.tables import Cell, read_table
from tests.lab_projects import new_project

from pipeline.project.logs.run_log import read_steps
from pipeline.stages.registry import open_project
from tests.helpers.families import FAMILIES
from tests.helpers.families import new_project as family_project
from tests.helpers.projects import make

STUDY = "study_learning_rate"
GIVEN = {
    **{
        "seeds": [1],
        "epochs": 4,
        "ranks": [1, 3],
        "learning_rates": [1e-3, 1e-2, 1e30],
        "full_rates": [1e-3, 1e30],
    },
    **{"attention_rank": 5, "feed_forward_rank": 4, "alpha": 8},
}


def studied(root: Path, *more: str) -> list[str]:
    """Run the study; returns what it was given."""
    given = [f"{STUDY}.{key}={json.dumps(value)}" for key, value in GIVEN.items()]
    make(root, [STUDY], [*given, *more])
    return given


def table(root: Path, name: str) -> list[dict[str, Cell]]:
    return read_table(root / f"artifacts/studies/learning_rate/{name}.csv")


def regrets(root: Path) -> dict[str, Row]:
    """The verdicts of the post's claims, by id."""
    rows = verdicts(open_project(root / "params.yaml"))
    return {row["id"]: row for row in rows if row["section"] == "LoRA Without Regret"}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = new_project(tmp_path_factory.mktemp("rates") / "mini")
    make(root, ["pretrain", "expand_vocab"], ["pretrain.epochs=5"])
    studied(root)
    return root


def test_a_loss_is_that_of_a_run_by_itself_and_the_best_is_the_lowest(mini: Path) -> None:
    losses = {(r["targets"], r["rank"], r["learning_rate"]): r for r in table(mini, "losses")}
    common = {"seed": 1, "epochs": 4, "learning_rate": 0.01, "eval_data": "data/finetune.de.txt"}
    lora = {
        **common,
        "rank": 3,
        "alpha": 8,
        "target_modules": ["all-linear"],
        "train_embeddings": "new_rows",
    }
    make(
        mini,
        ["finetune_lora"],
        [f"finetune_lora.{key}={json.dumps(value)}" for key, value in lora.items()],
    )
    (*_, last) = read_steps(mini / "artifacts/lora_adapter/loss.csv")
    assert losses[ALL, 3, 0.01]["loss"] == pytest.approx(last.eval_loss, rel=1e-4)
    full = {**common, "learning_rate": 1e-3}
    make(
        mini,
        ["finetune_full"],
        [f"finetune_full.{key}={json.dumps(value)}" for key, value in full.items()],
    )
    (*_, last) = read_steps(mini / "artifacts/full_finetuned/loss.csv")
    assert losses[FULL, None, 0.001]["loss"] == pytest.approx(last.eval_loss, rel=1e-5)
    assert losses[FULL, None, 1e30]["loss"] is None and losses[FULL, None, 1e30]["diverged"] == 1
    for best in table(mini, "best"):
        own = [
            r
            for (targets, rank, _), r in losses.items()
            if (targets, rank) == (best["targets"], best["rank"])
        ]
        least = min((r for r in own if r["loss"] is not None), key=lambda r: float(r["loss"] or 0))
        assert (best["learning_rate"], best["loss"]) == (least["learning_rate"], least["loss"])


def test_attention_and_feed_forward_have_as_many_parameters(mini: Path) -> None:
    trained = {row["targets"]: row["trained"] for row in table(mini, "best")}
    assert trained[ATTENTION] == trained[FEED_FORWARD]


def test_the_posts_claims_are_judged_by_the_tables(mini: Path) -> None:
    rows, best = regrets(mini), table(mini, "best")
    full = next(row for row in best if row["targets"] == FULL)
    rates = {f"rank {row['rank']}": row["learning_rate"] for row in best if row["targets"] == ALL}
    expected = {
        name: float(rate or 0) / float(full["learning_rate"] or 0) for name, rate in rates.items()
    }
    ten = rows["regret-ten-times"]
    assert ten["measured"] == pytest.approx(expected)
    inside = [5 <= ratio <= 20 for ratio in expected.values()]
    assert ten["verdict"] == ("holds" if all(inside) else "depends" if any(inside) else "differs")
    losses = {row["targets"]: float(row["loss"] or 0) for row in best}
    assert rows["regret-feed-forward"]["measured"]["in the mean"] == (
        losses[FEED_FORWARD] < losses[ATTENTION]
    )
    assert len(rows) == 5 and "not run" not in {row["verdict"] for row in rows.values()}


def test_on_an_imported_base_they_are_judged_too_and_those_of_minigpt_are_not(
    tmp_path: Path,
) -> None:
    root = family_project(tmp_path / "llama", FAMILIES["llama"])
    params = root / "params.yaml"
    data = "data/asked.jsonl"
    section = f"\n{STUDY}:\n  data: {data}\n  eval_data: {data}\n"
    params.write_text(params.read_text(encoding="utf-8") + section, encoding="utf-8")
    make(root, ["pretrain", "expand_vocab"])
    studied(root, "finetune_lora.window=0", "finetune_lora.train_embeddings=none")
    assert {row["verdict"] for row in regrets(root).values()} <= {"holds", "differs", "depends"}
    others = [row for row in verdicts(open_project(params)) if row["id"] == "awq-better"]
    assert [row["verdict"] for row in others] == ["not run"]
