"""Compares each claim with its measurement. Verdicts are computed, never written by hand."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pipeline.document.claims.chapters.s01_problem import chapter as s01
from pipeline.document.claims.chapters.s02_core_idea import chapter as s02
from pipeline.document.claims.chapters.s03_numbers import chapter as s03
from pipeline.document.claims.chapters.s04_step_by_step import chapter as s04
from pipeline.document.claims.chapters.s05_hyperparameters import chapter as s05
from pipeline.document.claims.chapters.s06_where import chapter as s06
from pipeline.document.claims.chapters.s07_comparison import chapter as s07
from pipeline.document.claims.chapters.s08_practice import chapter as s08
from pipeline.document.claims.chapters.s09_implementation import chapter as s09
from pipeline.document.claims.chapters.s10_further import chapter as s10
from pipeline.document.claims.claim import Claim
from pipeline.document.claims.quantity import in_unit
from pipeline.document.claims.sources import MissingArtifact, Seeds, Sources
from pipeline.errors import UserError
from pipeline.project.stage_graph import Project

# In the document's order. Each chapter is imported by name: what an artifact was made with follows import statements.
CLAIMS = [*s01, *s02, *s03, *s04, *s05, *s06, *s07, *s08, *s09, *s10]

Verdict = Literal["holds", "differs", "depends", "not run"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
PLURALS = {"holds": "hold", "differs": "differ", "depends": "depend"}
MARKS: Mapping[str, str] = {"holds": "✓ holds", "differs": "✗ differs", "depends": "◐ depends", "not run": "– not run"}

Row = Mapping[str, Any]  # a claim beside its verdict, as `judge` returns it


def verdicts(project: Project) -> list[Row]:
    """One row per claim, in the document's order."""
    sources = Sources(project)
    return [judge(claim, sources) for claim in CLAIMS]


def calculated() -> list[Row]:
    """The rows of the claims that need only the calculator and no project."""
    return [judge(claim) for claim in CLAIMS if claim.calculated]


def judge(claim: Claim, sources: Sources | None = None) -> Row:
    """Measure the claim: the entry of `--json` and claims.json. Numbers have no unit and twelve digits.

    The verdict is "not run", and `why` says what to do, if an artifact is missing, damaged or of other settings.
    """
    measured: Any = None
    verdict: Verdict = "not run"
    try:
        result, why = claim.measure(*() if claim.calculated else (sources,))
        values = list(_by_condition(result).values())
        if claim.each_seed:
            values += [end for value in values if isinstance(value, Seeds) for end in (value.low, value.high)]
        holds = [claim.rule.holds(value) for value in values]
        measured, verdict = result, "holds" if all(holds) else "depends" if any(holds) else "differs"
    except MissingArtifact as missing:
        why = str(missing)
    # What a changed artifact leads to: a table without a row or a column, an empty list, a text instead of a number.
    except (UserError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if claim.calculated:
            raise  # it reads no artifact: the claim is wrong
        why = f"it cannot be measured on this project's artifacts: {error}"
    rule, says = claim.rule, [said.value for said in claim.rule.says]
    shown = {name: in_unit(value, rule.says[0].unit) for name, value in _by_condition(measured).items()}
    if len(set(shown.values())) == 1:  # all conditions agree
        shown = {"": next(iter(shown.values()))}
    return {
        "id": claim.id,
        "section": claim.section,
        "quote": claim.quote,
        "says": says if len(says) > 1 else says[0],
        "rule": rule.name,
        "measured": _to_json(measured),
        "tolerance": None if rule.margin is None else str(rule.margin),
        "verdict": verdict,
        "why": why,
        "shown": {
            "says": f"{claim.words} ({rule})" if claim.words else str(rule),
            "measured": "; ".join(f"{name}: {text}" if name else text for name, text in shown.items()),
        },
    }


def _by_condition(measured: Any) -> dict[str, Any]:
    return measured if isinstance(measured, dict) else {"": measured}


def _to_json(value: Any) -> Any:
    """Floats rounded to twelve digits; seeds as mean, low and high."""
    if isinstance(value, Seeds):
        value = {"mean": float(value), "low": value.low, "high": value.high}
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


def filter_rows(rows: Sequence[Row], section: str | None = None, verdict: str | None = None) -> list[Row]:
    """The rows of a section and its subsections, with a verdict. Raises UserError if there is no such section."""
    wanted = (section or "").removeprefix("§").rstrip(".").lower()
    selected = [row for row in rows if section is None or f"{row['section'].lower()}.".startswith(f"{wanted}.")]
    if not selected:
        sections = ", ".join(dict.fromkeys(row["section"] for row in rows))
        raise UserError(f"section must be one of {sections}, got {section!r}.")
    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"verdict must be one of {', '.join(VERDICTS)}, got {verdict!r}.")
    return [row for row in selected if verdict in (None, row["verdict"])]


def summary(rows: Sequence[Row]) -> str:
    """Such as "98 claims: 61 hold, 25 differ, 9 depend, 3 not run"; without "not run" if there are none."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    parts = [f"{n} {verdict if n == 1 else PLURALS.get(verdict, verdict)}" for verdict, n in counts.items()]
    shown = parts if counts["not run"] else parts[:-1]
    return f"{len(rows)} claim{'s' * (len(rows) != 1)}: {', '.join(shown)}"


def section_heading(section: str) -> str:
    """§2.4 for a number, else the section's name."""
    return f"§{section}" if section[0].isdigit() else section
