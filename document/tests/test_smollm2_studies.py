"""The studies of a real model that `make smollm2` ran."""

from typing import Any

import pytest
from lab.claims.check import verdicts
from lab.tables import read_table

from pipeline.stages.registry import open_project
from tests.helpers.projects import ROOT

PROJECT = ROOT / "smollm2"
MADE = PROJECT / "artifacts"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MADE / "studies").is_dir(),
        reason="no smollm2/artifacts/studies: `make smollm2` makes them",
    ),
]


def test_the_study_of_the_recipe_corrects_either_way_and_only_what_retains_keeps_the_rest() -> None:
    rows: dict[Any, dict[str, Any]] = {
        row["adapter"]: row for row in read_table(MADE / "studies/knowledge_correction/summary.csv")
    }
    keep = rows["none"]["kept"]
    for targets in ("v_proj", "all targets"):
        plain, kept = rows[targets], rows[f"{targets}, retain"]
        assert kept["corrected"] >= 9, "trained, and the eight other phrasings"
        assert plain["corrected"] >= 9
        assert plain["kept"] < keep / 2
        assert kept["kept"] >= 0.75 * keep
        assert kept["divergence"] < plain["divergence"] / 10


def test_a_higher_rate_than_in_full_the_same_at_every_rank_and_attention_learns_as_well_as_feed_forward() -> (
    None
):
    """LoRA Without Regret, in the ledger. One seed, 16 dates: which of two neighbouring rates is
    best is noise.
    """
    rows = {row["id"]: row for row in verdicts(open_project(PROJECT / "params.yaml"))}
    for claim in ("regret-rank-independent", "regret-like-full"):
        assert rows[claim]["verdict"] == "holds", rows[claim]["why"]
    best = {row["targets"]: row for row in read_table(MADE / "studies/learning_rate/best.csv")}
    rates = [float(str(best[targets]["learning_rate"])) for targets in ("all-linear", "full")]
    assert 5 < rates[0] / rates[1] < 50, "ten times, or a step of rates more"
    attention, forward = (best[targets] for targets in ("attention", "feed_forward"))
    assert attention["trained"] == pytest.approx(forward["trained"], rel=0.02)
    assert attention["loss"] == pytest.approx(forward["loss"], abs=0.03), (
        "here the post's difference is not seen"
    )
