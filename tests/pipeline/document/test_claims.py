"""The language of measurements computes what Python does and nothing else; verdicts follow from their rules alone."""

import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.document.claims import quantity
from pipeline.document.claims.check import ClaimResult, check, filter_rows, markdown_table, summary
from pipeline.document.claims.claims import read_claims
from pipeline.document.claims.expression import parse
from pipeline.document.claims.sources import MissingArtifact, Sources
from pipeline.document.tables import Spread
from pipeline.errors import UserError

FUNCTIONS = Sources().functions


def value(text: str, **names: Any) -> Any:
    return parse(text, names, FUNCTIONS).value(names, FUNCTIONS)


numbers = st.integers(-50, 50) | st.floats(-50, 50).map(lambda x: round(x, 3))
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "**": operator.pow}


@st.composite
def sums(draw: st.DrawFn, depth: int = 3) -> str:
    """Any arithmetic on a few numbers, as text."""
    if not depth or draw(st.booleans()):
        return repr(draw(numbers))
    sign = draw(st.sampled_from(sorted(OPERATORS)))
    right = str(draw(st.integers(-3, 3))) if sign == "**" else draw(sums(depth - 1))
    return f"({draw(sums(depth - 1))} {sign} {right})"


@given(sums())
def test_arithmetic_is_pythons_own(text: str) -> None:
    try:
        wanted = eval(text)
    except (ZeroDivisionError, OverflowError) as error:
        wanted = error
    if isinstance(wanted, Exception | complex) or not math.isfinite(wanted) or abs(wanted) >= 2**1024:
        with pytest.raises(UserError):
            value(text)
    else:
        assert value(text) == wanted
        assert type(value(text)) is type(wanted)


@given(numbers, numbers, numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
def test_comparisons_are_pythons_own(a: float, b: float, c: float, sign: str) -> None:
    for text in (f"{a} {sign} {b}", f"{a} {sign} {b} {sign} {c}", f"not ({a} {sign} {b}) or {b} {sign} {c}"):
        assert value(text) is eval(text)


def test_parts_of_json_and_functions_are_reached() -> None:
    tree = {"a": {"b c": [1, 2, {"d": "x"}]}, "in": 3}
    assert value("tree.a['b c'][2].d", tree=tree) == "x"
    assert value("tree['in'] + tree.a['b c'][-2]", tree=tree) == 5
    assert value("find(rows, name='k').size", rows=[{"name": "q", "size": 1}, {"name": "k", "size": 2}]) == 2
    assert value("max(1, min(many)) + abs(-1) + round(1.26, 1)", many=[3, 2]) == 2 + 1 + 1.3
    assert value("len('abc') + len(many) + sqrt(4) + log2(8)", many=[3, 2]) == 3 + 2 + 2 + 3
    assert value("min(values(many)) + many[round(0.6)]", many={"a": 3, 1: 2}) == 2 + 2
    assert value("'x' in a and 'y' not in a", a=["x"]) is True
    assert value("calc(model='minigpt', rank=4).parameters.trainable") == 4096
    seeds = Spread(0.5, 0.4, 0.7)
    assert value("s + 1", s=seeds) == 1.5
    assert value("s.high - s.low", s=seeds) == pytest.approx(0.3)
    assert value("s < 0.6", s=seeds) is True


REFUSED = [
    "().__class__",
    "(1).__class__",
    "'a'.__class__.__mro__",
    "calc.__globals__",
    "calc().__class__",
    "calc()['__class__']",
    "min.__self__",
    "__import__('os')",
    "open('params.yaml')",
    "nothing",
    "min",
    "lambda: 1",
    "[x for x in calc()]",
    "[1, 2]",
    "{'a': 1}",
    "(1, 2)",
    "1 if true else 2",
    "(x := 1)",
    "f'{1}'",
    "b'a'",
    "1j",
    "...",
    "1 @ 2",
    "1 // 2",
    "1 << 99",
    "~1",
    "+1",
    "1 is 1",
    "calc(**calc())",
    "study('a/b', **calc())",
    "min(*calc())",
    "calc()[1:2]",
    "calc().parameters.nothing",
    "len()",
    "sqrt(1, 2)",
    "sqrt(x=1)",
    "sqrt(-1)",
    "log2(0)",
    "min('a', 2)",
    "1 + 'a'",
    "1 + true",
    "'a' < 'b'",
    "'a' * 9",
    "1 / 0",
    "(-8) ** 0.5",
    "9 ** 9 ** 9",
    "10 ** 400 + 0.5",
    "2.0 ** 5000",
    "1e999",
    "9" * 900,
    "-" * 900 + "1",
    "(" * 300 + "1" + ")" * 300,
    "1 +",
    "",
    "1; 2",
    "x = 1",
    "1 + " * 400 + "1",
    "calc(model='gpt-9')",
    "calc(colour=1)",
    "calc(model=1)",
    "calc(rank='a')",
    "calc(rank=0)",
    "model('../x')",
    "gpu('none')",
    "find(1, a=2)",
]


@pytest.mark.parametrize("text", REFUSED)
def test_whatever_else_python_has_is_refused_in_a_message(text: str) -> None:
    with pytest.raises(UserError) as refused:
        value(text)
    assert 10 < len(str(refused.value)) < 600


def test_a_refusal_names_the_expression_and_what_is_allowed() -> None:
    for text, said in (
        ("1 if 2 else 3", "`1 if 2 else 3`: 1 if 2 else 3 is not allowed. Allowed: numbers, texts, true, false"),
        ("nope(1)", "there is no function nope. There are: abs, artifact, calc"),
        ("x + 1", "there is no name x. There are: false, true"),
        ("study()", "It is called as study(table, **where)"),
        ("calc().memory.wait", "there is no 'wait' among weights"),
    ):
        with pytest.raises(UserError) as refused:
            value(text)
        assert said in str(refused.value)


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_refused(text: str) -> None:
    try:
        value(text)
    except (UserError, MissingArtifact):
        return


def test_a_measure_of_what_was_not_run_says_what_to_run() -> None:
    with pytest.raises(MissingArtifact, match="run `lora claims` in one"):
        value("artifact('evaluation/metrics.json').full")


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
def test_a_quantity_is_read_and_shown_as_the_document_writes_it(written: Any, meant: Any, shown: str) -> None:
    assert quantity.read(written).value == meant
    assert str(quantity.read(written)) == shown


def test_several_seeds_show_their_mean_and_how_far_one_lies_from_it() -> None:
    assert quantity.in_unit(Spread(0.674, 0.61, 0.7), "%") == "67% ±6"
    assert quantity.in_unit(Spread(0.915, 0.913, 0.92), "%") == "91.5% ±0.5"
    assert quantity.in_unit(Spread(0.9942, 0.9938, 0.9941), "%") == "99.4%"
    assert quantity.in_unit(Spread(0.25008, 0.24796, 0.252), "") == "0.250 ±0.002"
    assert quantity.in_unit(Spread(3.0, 2.0, 4.5), "") == "3 ±2"
    assert quantity.in_unit(Spread(8.0, 8.0, 8.0), "") == "8"
    assert quantity.in_unit(Spread(16.4e9, 16.1e9, 16.5e9), "GB") == "16.4 ±0.3 GB"


@given(st.floats(1e-6, 1e6), st.sampled_from(sorted(quantity.UNITS)))
def test_what_is_shown_is_within_half_a_percent_of_what_was_measured(number: float, unit: str) -> None:
    shown = quantity.in_unit(number * quantity.UNITS[unit], unit)
    text = shown.removesuffix(unit).strip().replace(",", "")
    assert float(text) == pytest.approx(number, rel=0.005)


# verdicts


def claim(**changes: Any) -> dict[str, Any]:
    """A claim that holds, but for the changes."""
    plain = {
        "id": "one",
        "section": "1",
        "quote": "so it is",
        "says": 4,
        "rule": "equal",
        "measure": "2 + 2",
        "why": "w",
    }
    return {**plain, **changes}


def judged(folder: Path, *entries: Mapping[str, Any], sources: Sources | None = None) -> list[ClaimResult]:
    """The verdicts on a file of such claims."""
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump(list(entries), sort_keys=False), encoding="utf-8")
    return list(check(read_claims(path, "claims.yaml"), sources or Sources()))


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"says": 5}, "differs"),
        ({"says": 4.1, "tolerance": "3%"}, "holds"),
        ({"says": 4.1, "tolerance": "2%"}, "differs"),
        ({"says": 4.1, "tolerance": 0.1}, "holds"),
        ({"says": "400%", "tolerance": "1 points", "measure": "4.02"}, "differs"),
        ({"says": "400%", "tolerance": "3 points", "measure": "4.02"}, "holds"),
        ({"says": [4, 5], "rule": "between"}, "holds"),
        ({"says": [4.1, 5], "rule": "between"}, "differs"),
        ({"says": [3, 3.9], "rule": "between"}, "differs"),
        ({"rule": "at_least"}, "holds"),
        ({"rule": "at_most"}, "holds"),
        ({"rule": "more_than"}, "differs"),
        ({"rule": "less_than"}, "differs"),
        ({"rule": "less_than", "says": 5}, "holds"),
        ({"rule": "at_least", "says": 5}, "differs"),
        ({"rule": "at_most", "says": 3}, "differs"),
        ({"says": True, "measure": "1 < 2"}, "holds"),
        ({"says": False, "measure": "1 < 2"}, "differs"),
        ({"says": "minigpt", "measure": "model('minigpt').name"}, "holds"),
        ({"says": "sofa", "measure": "model('minigpt').name"}, "differs"),
        ({"measure": {"here": "4", "there": "4.0"}}, "holds"),
        ({"measure": {"here": "4", "there": "5"}}, "depends"),
        ({"measure": {"here": "3", "there": "5"}}, "differs"),
        ({"measure": {"here": "4", "there": "size('x.json')"}}, "not run"),
    ],
)
def test_a_verdict_follows_from_rule_and_measure(tmp_path: Path, changes: Mapping[str, Any], verdict: str) -> None:
    (found,) = judged(tmp_path, claim(**changes))
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"says": "16 GB", "tolerance": "5%"}, "16 GB ± 0.8 GB"),
        ({"says": "24%", "tolerance": "50%"}, "24% ± 12 points"),
        ({"says": "98%", "tolerance": "15 points"}, "98% ± 15 points"),
        ({"says": 4, "tolerance": 0.5, "words": "about four"}, "about four (4 ± 0.5)"),
        ({"says": ["5 ×", "10 ×"], "rule": "between"}, "5 × to 10 ×"),
        ({"says": "1%", "rule": "at_most"}, "≤ 1%"),
    ],
)
def test_how_far_from_what_is_said_still_holds_is_shown(tmp_path: Path, changes: Mapping[str, Any], shown: str) -> None:
    (found,) = judged(tmp_path, claim(**changes))
    row = found.row()
    assert found.says_text == row["shown"]["says"] == shown
    assert row["tolerance"] == (str(changes["tolerance"]) if "tolerance" in changes else None)


@given(said=st.floats(-1e6, 1e6), measured=st.floats(-1e6, 1e6), share=st.floats(0.001, 0.5))
def test_a_tolerance_is_a_share_of_what_is_said(said: float, measured: float, share: float) -> None:
    from pipeline.document.claims.check import _holds
    from pipeline.document.claims.claims import Claim, Tolerance

    one = Claim("a", "1", "q", (quantity.Quantity(said),), "equal", {}, "w", tolerance=Tolerance(share, relative=True))
    distance, margin = abs(measured - said), share * abs(said)
    if abs(distance - margin) > 1e-6 * (1 + margin):
        assert _holds(one, measured) is (distance < margin)


class _Seeds(Sources):
    """A study of three seeds."""

    def study(self, table: str, **where: Any) -> Mapping[str, Any]:  # noqa: ARG002
        return {"p": Spread(0.94, 0.8, 0.99)}


@pytest.mark.parametrize(
    ("says", "seeds", "verdict"),
    [("94%", "mean", "holds"), ("94%", "each", "depends"), ("50%", "each", "differs"), ("80%", "mean", "holds")],
)
def test_seeds_are_judged_by_their_mean_or_each(tmp_path: Path, says: str, seeds: str, verdict: str) -> None:
    tolerance = "14 points" if says == "80%" else "5 points"
    entry = claim(says=says, seeds=seeds, tolerance=tolerance, measure="study('a/b').p", why="{measured:%}")
    (found,) = judged(tmp_path, entry, sources=_Seeds())
    assert (found.verdict, found.measured_text, found.why) == (verdict, "94% ±14", "94% ±14")
    assert found.row()["measured"] == {"mean": 0.94, "low": 0.8, "high": 0.99}


def test_a_reason_is_filled_with_what_was_measured(tmp_path: Path) -> None:
    values = {"k": "find(calc().projections, name='k_proj')", "half": "k.out / 2"}
    (found,) = judged(tmp_path, claim(values=values, why="k is {k.in} → {k.out}, {half} of it; {measured}, {says:%}"))
    assert found.why == "k is 4,096 → 1,024, 512 of it; 4, 400%"


def test_words_are_shown_with_how_they_are_taken(tmp_path: Path) -> None:
    (found,) = judged(tmp_path, claim(says="5%", rule="less_than", words="negligible", measure="0.01"))
    assert (found.says_text, found.verdict) == ("negligible (< 5%)", "holds")


def test_conditions_are_shown_each_or_once_where_they_agree(tmp_path: Path) -> None:
    many, one = judged(tmp_path, claim(measure={"a": "4", "b": "5"}), claim(id="b", measure={"a": "4", "b": "4"}))
    assert (many.measured_text, one.measured_text) == ("a: 4; b: 5", "4")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": "about"}, "claim 1 (one): rule must be one of equal, between, at_least"),
        ({"says": [1, 2]}, "rule equal needs 1 in `says`, got 2"),
        ({"says": 4, "rule": "between"}, "rule between needs 2"),
        ({"says": "sofa", "rule": "at_least"}, "compares numbers"),
        ({"tolerance": "5%", "rule": "at_most"}, "15 points or 0.5, with rule equal, got"),
        ({"tolerance": "wide"}, "tolerance must be a positive number such as 5%"),
        ({"measure": "os.system('x')"}, "os.system('x') is not allowed"),
        ({"measure": {"a": ["4"]}}, "a measure must be an expression"),
        ({"measure": {1: "4"}}, "measure must map names to expressions"),
        ({"measure": "x"}, "there is no name x"),
        ({"values": {"x": "y"}}, "there is no name y"),
        ({"why": "{x}"}, "{x} in `{x}` is not a value"),
        ({"why": "{measured:stone}"}, "no unit stone"),
        ({"why": "{"}, "has a brace outside of"),
        ({"seeds": "some"}, "seeds must be mean or each"),
        ({"verdict": "holds"}, "has the unknown key verdict"),
        ({"why": ""}, "lacks why"),
        ({"id": 3}, "id must be a text"),
    ],
)
def test_a_broken_claim_is_named_before_anything_is_measured(
    tmp_path: Path, changes: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        judged(tmp_path, claim(**changes))
    assert said in str(refused.value) and "claims.yaml: claim 1" in str(refused.value)


def test_a_claim_that_measures_another_kind_of_thing_is_refused(tmp_path: Path) -> None:
    for changes in ({"measure": "'four'"}, {"measure": "1 < 2"}, {"measure": "calc()"}, {"says": "x"}):
        with pytest.raises(UserError, match="claim one: it measures"):
            judged(tmp_path, claim(**changes))
    with pytest.raises(UserError, match=r"claim one: `1 / 0`: division by zero\. Edit the claim"):
        judged(tmp_path, claim(measure="1 / 0"))


@pytest.mark.parametrize("text", ["", "a: 1", "[]", "- 1", "- [", "- {id: one}", "\xff"])
def test_a_file_that_holds_no_claims_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"claims\.yaml"):
        read_claims(path, "claims.yaml")
    with pytest.raises(UserError, match="is used twice"):
        judged(tmp_path, claim(), claim())


def test_rows_are_filtered_counted_and_written_as_markdown(tmp_path: Path) -> None:
    entries = [
        claim(section="2.1"),
        claim(id="b", section="2.3", says=5, quote="a < b | c"),
        claim(id="c", section="10", measure={"x": "4", "y": "5"}),
        claim(id="d", section="10.1", measure="size('x')"),
    ]
    rows = [one.row() for one in judged(tmp_path, *entries)]
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
