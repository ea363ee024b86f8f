"""Verdicts follow from their rules alone, and a project that lacks or changed something gets a
reason, no traceback.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.claims import (
    UNITS,
    Chapter,
    Quantity,
    about,
    at_least,
    at_most,
    between,
    in_unit,
    less_than,
    more_than,
    probability,
)
from lab.claims.check import (
    Row,
    filter_rows,
    judge,
    markdown_table,
    summary,
    verdicts,
)
from lab.claims.sources import MissingArtifact, Sources, calc, find, model
from lab.tables import Spread
from tests.lab_projects import new_project

from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST
from pipeline.stages.registry import open_project

# quantities


@pytest.mark.parametrize(
    ("written", "meant", "shown"),
    [
        (64, 64, "64"),
        ("16 GB", 16e9, "16 GB"),
        ("18 MiB", 18 * 2**20, "18 MiB"),
        ("6.25%", 0.0625, "6.25%"),
        ("0.065%", 0.00065, "0.065%"),
        ("100%", 1, "100%"),
        ("8 billion", 8e9, "8 billion"),
        ("12,288", 12288, "12,288"),
        ("430 ×", 430, "430 ×"),
        ("15 points", 0.15, "15 points"),
        ("0.375 B", 0.375, "0.375 B"),
        ("sofa", "sofa", "sofa"),
        ("4 apples", "4 apples", "4 apples"),
        (True, True, "yes"),
        (1.0, 1.0, "1"),
        (0.00001, 1e-5, "0.00001"),
    ],
)
def test_a_quantity_is_read_and_shown_as_the_document_writes_it(
    written: Any, meant: Any, shown: str
) -> None:
    assert Quantity.read(written).value == meant
    assert str(Quantity.read(written)) == shown


def test_several_seeds_show_their_mean_and_how_far_one_lies_from_it() -> None:
    assert in_unit(Spread(0.674, 0.61, 0.7), "%") == "67% ±6"
    assert in_unit(Spread(0.915, 0.913, 0.92), "%") == "91.5% ±0.5"
    assert in_unit(Spread(0.9942, 0.9938, 0.9941), "%") == "99.4%"
    assert in_unit(Spread(0.25008, 0.24796, 0.252)) == "0.250 ±0.002"
    assert in_unit(Spread(3.0, 2.0, 4.5)) == "3 ±2"
    assert in_unit(Spread(8.0, 8.0, 8.0)) == "8"
    assert in_unit(Spread(16.4e9, 16.1e9, 16.5e9), "GB") == "16.4 ±0.3 GB"
    assert in_unit([4, 1024]) == "4 × 1,024"


@given(st.floats(1e-6, 1e6), st.sampled_from(sorted(UNITS)))
def test_what_is_shown_is_within_half_a_percent_of_what_was_measured(
    number: float, unit: str
) -> None:
    shown = in_unit(number * UNITS[unit], unit)
    text = shown.removesuffix(unit).strip().replace(",", "")
    assert float(text) == pytest.approx(number, rel=0.005)


def test_seeds_compute_as_their_mean() -> None:
    measured = Spread(0.5, 0.4, 0.7)
    assert (
        measured + 1 == 1.5
        and measured < 0.6
        and measured.high - measured.low == pytest.approx(0.3)
    )
    assert not isinstance(measured - 0.1, Spread), "a difference has no extremes of its own"


# verdicts


def judged(
    measured: Any,
    says: Any = 4,
    why: str = "w",
    section: str = "1",
    quote: str = "q",
    **options: Any,
) -> Row:
    """The row of a claim that needs no project."""
    chapter = Chapter()
    with chapter.section(section) as claim:

        @claim(quote, says, **options)
        def one() -> tuple[Any, str]:
            return measured, why

    return judge(chapter[0])


@pytest.mark.parametrize(
    ("measured", "says", "verdict"),
    [
        (4, 4, "holds"),
        (4, 5, "differs"),
        (4, about(4.1, "3%"), "holds"),
        (4, about(4.1, "2%"), "differs"),
        (4, about(4.1, 0.1), "holds"),
        (4.02, about("400%", "1 points"), "differs"),
        (4.02, about("400%", "3 points"), "holds"),
        (0.8, probability("94%"), "holds"),
        (0.7, probability("94%"), "differs"),
        (0.05, probability("8%"), "holds"),
        (0.03, probability("8%"), "differs"),
        (4, between(4, 5), "holds"),
        (4, between(4.1, 5), "differs"),
        (4, between(3, 3.9), "differs"),
        (4, at_least(4), "holds"),
        (4, at_most(4), "holds"),
        (4, more_than(4), "differs"),
        (4, less_than(4), "differs"),
        (4, less_than(5), "holds"),
        (4, at_least(5), "differs"),
        (4, at_most(3), "differs"),
        (True, True, "holds"),
        (True, False, "differs"),
        ("minigpt", "minigpt", "holds"),
        ("minigpt", "sofa", "differs"),
        ({"here": 4, "there": 4.0}, 4, "holds"),
        ({"here": 4, "there": 5}, 4, "depends"),
        ({"here": 3, "there": 5}, 4, "differs"),
    ],
)
def test_a_verdict_follows_from_rule_and_measure(measured: Any, says: Any, verdict: str) -> None:
    assert judged(measured, says)["verdict"] == verdict


@pytest.mark.parametrize(
    ("says", "words", "shown", "tolerance"),
    [
        (about("16 GB", "5%"), "", "16 GB ± 0.8 GB", "5%"),
        (about("24%", "50%"), "", "24% ± 12 points", "50%"),
        (probability("98%"), "", "98% ± 15 points", "15 points"),
        (about(4, 0.5), "about four", "about four (4 ± 0.5)", "0.5"),
        (between("5 ×", "10 ×"), "", "5 × to 10 ×", None),
        (at_most("1%"), "", "≤ 1%", None),
        (less_than("5%"), "negligible", "negligible (< 5%)", None),
    ],
)
def test_how_far_from_what_is_said_still_holds_is_shown(
    says: Any, words: str, shown: str, tolerance: Any
) -> None:
    row = judged(4, says, words=words)
    assert (row["shown"]["says"], row["tolerance"]) == (shown, tolerance)


@given(said=st.floats(-1e6, 1e6), measured=st.floats(-1e6, 1e6), share=st.floats(0.001, 0.5))
def test_a_tolerance_is_a_share_of_what_is_said(said: float, measured: float, share: float) -> None:
    distance, margin = abs(measured - said), share * abs(said)
    if abs(distance - margin) > 1e-6 * (1 + margin):
        assert about(said, f"{100 * share:.15f}%").holds(measured) is (distance < margin)


@pytest.mark.parametrize(
    ("says", "each", "verdict"),
    [
        (about("94%", "5 points"), False, "holds"),
        (about("94%", "5 points"), True, "depends"),
        (about("50%", "5 points"), True, "differs"),
        (about("80%", "14 points"), False, "holds"),
    ],
)
def test_seeds_are_judged_by_their_mean_or_each(says: Any, each: bool, verdict: str) -> None:
    row = judged(Spread(0.94, 0.8, 0.99), says, each_seed=each)
    assert (row["verdict"], row["shown"]["measured"]) == (verdict, "94% ±14")
    assert row["measured"] == {"mean": 0.94, "low": 0.8, "high": 0.99}


def test_conditions_are_shown_each_or_once_where_they_agree() -> None:
    assert judged({"a": 4, "b": 5})["shown"]["measured"] == "a: 4; b: 5"
    assert judged({"a": 4, "b": 4})["shown"]["measured"] == "4"


def test_a_claim_is_named_after_its_function_and_calculated_if_that_asks_no_project() -> None:
    chapter = Chapter()
    with chapter.section("1") as claim:

        @claim("a", 4)
        def _4_apples() -> tuple[Any, str]:
            return 4, "w"

        @claim("b", at_least(4), id="given")
        def measure(m: Sources) -> tuple[Any, str]:
            return m.size("base/config.json"), "w"

    assert [(one.id, one.calculated, one.rule.name) for one in chapter] == [
        ("4-apples", True, "equal"),
        ("given", False, "at_least"),
    ]


def test_a_calculated_claim_that_fails_is_an_error_of_ours() -> None:
    for measured in ("four", True, None, [4]):
        with pytest.raises(TypeError, match=r"it measures .*, but the document says a number"):
            judged(measured)
    chapter = Chapter()
    with chapter.section("1") as claim:
        claim("q", 4)(lambda: (1 / 0, "w"))
    with pytest.raises(ZeroDivisionError):
        judge(chapter[0])


def test_rows_are_filtered_counted_and_written_as_markdown() -> None:
    rows = [
        judged(4, section="2.1", id="one"),
        judged(4, 5, section="2.3", quote="a < b | c", id="b"),
        judged({"x": 4, "y": 5}, section="10", id="c"),
        {**judged(4, section="10.1", id="d"), "verdict": "not run"},
    ]
    assert summary(rows) == "4 claims: 1 holds, 1 differs, 1 depends, 1 not run"
    assert summary(rows[:1]) == "1 claim: 1 holds, 0 differ, 0 depend"
    assert [row["id"] for row in filter_rows(rows, "2")] == ["one", "b"]
    assert [row["id"] for row in filter_rows(rows, "§2.3")] == ["b"]
    assert [row["id"] for row in filter_rows(rows, "10")] == ["c", "d"]
    assert [row["id"] for row in filter_rows(rows, None, "differs")] == ["b"]
    for wrong in (("1", None), ("3", None), (None, "wrong")):
        with pytest.raises(UserError, match="must be one of"):
            filter_rows(rows, *wrong)
    assert "| a &lt; b \\| c | 5 | 4 | ✗ differs | w |" in markdown_table(rows)


# what a measure can ask


@pytest.fixture
def asked(tmp_path: Path) -> Sources:
    """A project with one table and one artifact, written by hand."""
    root = new_project(tmp_path / "asked")
    for name, text in (
        (
            "studies/rank/ranks.csv",
            "rank,alpha,loss,loss_low,loss_high\n4,r,0.5,0.4,0.7\n8,r,0.3,0.3,0.3\n8,1,,,\n",
        ),
        (
            "figures/attention_row.csv",
            "model,distance,katze\nbase,0.4,0.2\nbase,0.1,0.6\nother,0.05,0.9\n",
        ),
        (
            "evaluation/metrics.json",
            '{"full": {"flat": 30, "in": 4, "none": null}, "rows": [{"k": 1}, {"k": 2}]}',
        ),
    ):
        (root / "artifacts" / name).parent.mkdir(parents=True)
        (root / "artifacts" / name).write_text(text, encoding="utf-8")
    return Sources(open_project(root / "params.yaml"))


def test_rows_columns_and_json_are_reached(asked: Sources) -> None:
    assert asked.row("rank/ranks", rank=4).loss == 0.5
    assert asked.row("rank/ranks", rank=4).loss.high == 0.7
    assert [row.loss for row in asked.rows("rank/ranks", rank=(8, 4), alpha="r")] == [0.3, 0.5]
    assert asked.column("rank/ranks", "loss", alpha="r") == [0.5, 0.3]
    assert asked.over_seeds("rank/ranks", "loss", alpha="r") == 0.4
    assert asked.over_seeds("rank/ranks", "loss", alpha="r").low == 0.3
    assert asked.row_of_least("rank/ranks", "loss", alpha="r").rank == 8
    assert asked.row_of_least("figures/attention_row", "distance", model="base").katze == 0.6
    metrics = asked.artifact("evaluation/metrics.json")
    assert (metrics.full.flat, metrics.full["in"], find(metrics.rows, k=2).k) == (30, 4, 2)
    assert len(asked.lines("pretrain.data")) == 22
    assert asked.size("studies/rank/ranks.csv") > 40


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (lambda m: m.row("rank/ranks", rank=16), "studies/rank/ranks.csv has no row with rank=16"),
        (
            lambda m: m.row("rank/ranks", rank=8),
            "studies/rank/ranks.csv has 2 rows instead of one with rank=8",
        ),
        (
            lambda m: m.column("rank/ranks", "loss", rank=16),
            "studies/rank/ranks.csv has no row with rank=16",
        ),
        (
            lambda m: m.column("rank/ranks", "loss"),
            "there is no value for 'loss', only for rank, alpha",
        ),
        (
            lambda m: m.row("rank/ranks", rank=4).width,
            "there is no value for 'width', only for rank, alpha, loss",
        ),
        (
            lambda m: m.artifact("evaluation/metrics.json").lora,
            "there is no value for 'lora', only for full",
        ),
        (
            lambda m: m.artifact("evaluation/metrics.json").full.none,
            "there is no value for 'none', only for flat",
        ),
        (lambda m: m.artifact("evaluation/metrics.json").full["in"] / 0, "division by zero"),
        (lambda m: m.artifact("../params.yaml"), "../params.yaml is not an artifact of a stage"),
        (lambda m: m.size("base/../../params.yaml"), "params.yaml is not an artifact of a stage"),
        (lambda m: m.size("/etc/hostname"), "/etc/hostname is not an artifact of a stage"),
        (lambda m: m.artifact("evaluation/metrics.json").full.flat < "a", "not supported between"),
    ],
)
def test_what_is_not_there_is_a_reason_and_no_error(
    asked: Sources, measure: Callable[[Sources], Any], said: str
) -> None:
    chapter = Chapter()
    with chapter.section("1") as claim:

        @claim("q", 4)
        def one(m: Sources) -> tuple[Any, str]:
            return measure(m), "w"

    row = judge(chapter[0], asked)
    assert (
        row["verdict"] == "not run" and row["measured"] is None and row["shown"]["measured"] == "–"
    )
    assert (
        row["why"].startswith("it cannot be measured on this project's artifacts: ")
        and said in row["why"]
    )


def test_an_artifact_that_was_not_made_says_what_to_run(asked: Sources) -> None:
    for measure, command in (
        (lambda: asked.artifact("base/config.json"), "lora pretrain"),
        (lambda: asked.steps("lora_adapter/loss.csv"), "lora finetune lora"),
        (lambda: asked.row("methods/cost", method="LoRA"), "lora study methods"),
        (lambda: asked.row("figures/placement", module="fc1"), "lora figures"),
    ):
        with pytest.raises(MissingArtifact, match=rf"does not exist: run `{command}`$"):
            measure()


def test_the_calculator_is_asked_as_on_the_command_line() -> None:
    assert calc("minigpt", rank=4).parameters.trainable == 4096
    assert find(calc(rank=8).projections, name="k_proj").out == 1024
    assert model("qwen3-8b").hidden == 4096
    with pytest.raises(UserError, match="colour"):
        calc(colour=1)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: "", id="empty"),
        pytest.param(lambda text: text.partition("\n")[0] + "\n", id="no rows"),
        pytest.param(lambda text: "\n".join(text.split("\n")[:2]) + "\n", id="one row"),
        pytest.param(lambda text: text.replace(",", ";"), id="one column"),
        pytest.param(
            lambda text: "\n".join(
                ",".join("x" * len(line.split(","))) for line in text.split("\n")
            ),
            id="x",
        ),
        pytest.param(
            lambda text: text.replace("_low", "").replace("0", "").replace("1", ""), id="blanks"
        ),
    ],
)
def test_no_damaged_table_or_artifact_ends_in_a_traceback(
    studied: Path, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    root = tmp_path / "project"
    shutil.copytree(studied, root, ignore=shutil.ignore_patterns(".lora-cache"))
    for path in (root / "artifacts").rglob("*.[cj]s*"):
        if path.suffix in (".csv", ".json") and path.name != MANIFEST:
            path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    rows = verdicts(open_project(root / "params.yaml"))
    lost = [row["why"] for row in rows if row["verdict"] == "not run"]
    assert len(lost) > 50
    assert all(
        "it cannot be measured on this project's artifacts: " in why or "does not exist" in why
        for why in lost
    )
