"""Compares each claim with its measurement. Verdicts are computed, never written by hand."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.document.claims import quantity
from pipeline.document.claims.claims import ALONE, RULES, Claim, read_claims
from pipeline.document.claims.sources import MissingArtifact, Sources
from pipeline.document.stages import Claims
from pipeline.document.tables import Spread
from pipeline.errors import UserError
from pipeline.project.new_project import DOCUMENT

Verdict = Literal["holds", "differs", "depends", "not run"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
VERB_FORMS = {"holds": ("holds", "hold"), "differs": ("differs", "differ"), "depends": ("depends", "depend")}
MARKS: Mapping[str, str] = {"holds": "✓ holds", "differs": "✗ differs", "depends": "◐ depends", "not run": "– not run"}


@dataclass(frozen=True)
class ClaimResult:
    """A claim and its verdict. `measured` maps each condition to its value; it is empty for "not run", and then `why`
    names the command to run."""

    claim: Claim
    verdict: Verdict
    measured: Mapping[str, Any]
    why: str

    @property
    def says_text(self) -> str:
        """The document's value with its tolerance, for display."""
        says, tolerance = self.claim.says, self.claim.tolerance
        margin = tolerance.format_margin(says[0]) if tolerance else ""
        number = " ".join(filter(None, (RULES[self.claim.rule].sign, " to ".join(map(str, says)), margin)))
        return f"{self.claim.words} ({number})" if self.claim.words else number

    @property
    def measured_text(self) -> str:
        """The measured values in the document's unit; a single value if all conditions agree."""
        unit = self.claim.says[0].unit
        shown = {name: quantity.in_unit(value, unit) for name, value in self.measured.items()}
        if len(set(shown.values())) <= 1:
            return next(iter(shown.values()), "–")
        return "; ".join(f"{name}: {value}" for name, value in shown.items())

    def row(self) -> dict[str, Any]:
        """The entry of `--json` and claims.json. Numbers have no unit prefix and twelve digits; sizes are in bytes."""
        claim, says = self.claim, [said.value for said in self.claim.says]
        measured = self.measured[ALONE] if ALONE in self.measured else dict(self.measured) or None
        return {
            **{"id": claim.id, "section": claim.section, "quote": claim.quote},
            **{"says": says if len(says) > 1 else says[0], "rule": claim.rule, "measured": _to_json(measured)},
            "tolerance": claim.tolerance and claim.tolerance.written,
            **{
                "verdict": self.verdict,
                "why": self.why,
                "shown": {"says": self.says_text, "measured": self.measured_text},
            },
        }


def check(claims: Iterable[Claim], sources: Sources) -> Iterator[ClaimResult]:
    """Yields the verdict on each claim: "not run" if its artifacts are missing, damaged or of other settings.

    Raises UserError if a claim that needs no project cannot be evaluated.
    """
    for claim in claims:
        try:
            yield _judge(claim, sources)
        except MissingArtifact as missing:
            yield ClaimResult(claim, "not run", {}, str(missing))
        except UserError as error:
            if claim.calculated:
                raise UserError(f"claim {claim.id}: {error}. Edit the claim.") from None
            yield ClaimResult(claim, "not run", {}, f"it cannot be measured on this project's artifacts: {error}")


def _judge(claim: Claim, sources: Sources) -> ClaimResult:
    values: dict[str, Any] = {}
    for name, expression in claim.values.items():
        values[name] = expression.value(values, sources.functions)
    measured = {name: expression.value(values, sources.functions) for name, expression in claim.measure.items()}
    holds = [_holds(claim, value) for result in measured.values() for value in _values_to_judge(claim, result)]
    verdict: Verdict = "holds" if all(holds) else "depends" if any(holds) else "differs"
    template_values = {**values, "measured": measured.get(ALONE, measured), "says": claim.says[0].value}
    return ClaimResult(claim, verdict, measured, quantity.fill_template(claim.why, template_values))


def _values_to_judge(claim: Claim, value: Any) -> Sequence[Any]:
    """The values that must satisfy the rule: the mean over seeds, and with `seeds: each` the extremes as well."""
    if not isinstance(value, Spread):
        return [value]
    return list(value) if claim.each_seed else [value.mean]


def _holds(claim: Claim, value: Any) -> bool:
    """Whether a measured value satisfies the claim's rule. Raises UserError if the types differ."""
    says = [said.value for said in claim.says]
    if _type_name(value) != _type_name(says[0]):
        raise UserError(
            f"it measures {_type_name(value)} ({value!r}), but the document says {_type_name(says[0])} ({says[0]!r})"
        )
    if claim.tolerance is None or isinstance(says[0], str):
        return RULES[claim.rule].holds(value, *says)
    margin = claim.tolerance.amount * (abs(says[0]) if claim.tolerance.relative else 1)
    return bool(abs(value - says[0]) <= margin * (1 + 1e-9))  # slack for rounding: exactly the margin still holds


def _type_name(value: Any) -> str:
    names = {bool: "true or false", str: "a text", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _to_json(value: Any) -> Any:
    """Floats rounded to twelve digits; a Spread as mean, low and high."""
    if isinstance(value, Spread):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _to_json(item) for name, item in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


Row = Mapping[str, Any]  # what `ClaimResult.row` returns


def calculated() -> list[Row]:
    """The verdicts on the packaged claims that need only the calculator and no project."""
    name = Claims().data
    claims = read_claims(DOCUMENT / name, name)
    return [result.row() for result in check((claim for claim in claims if claim.calculated), Sources())]


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
    parts = [f"{n} {VERB_FORMS.get(verdict, (verdict, verdict))[n != 1]}" for verdict, n in counts.items()]
    shown = parts if counts["not run"] else parts[:-1]
    return f"{len(rows)} claim{'s' * (len(rows) != 1)}: {', '.join(shown)}"


def section_heading(section: str) -> str:
    """§2.4 for a number, else the section's name."""
    return f"§{section}" if section[0].isdigit() else section


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [("claim", "document", "measured", "verdict", "why"), ("---",) * 5, *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    shown = row["quote"], row["shown"]["says"], row["shown"]["measured"], MARKS[row["verdict"]], row["why"]
    return tuple(text.replace("|", "\\|").replace("<", "&lt;") for text in shown)
