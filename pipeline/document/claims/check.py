"""Claims held against what is measured: the verdicts, computed and never written by hand."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.document.claims import quantity
from pipeline.document.claims.claims import ALONE, RULES, Claim, read_claims
from pipeline.document.claims.sources import MissingArtifact, Sources
from pipeline.document.params import Claims
from pipeline.document.tables import Spread
from pipeline.errors import UserError
from pipeline.project.new_project import DOCUMENT

Verdict = Literal["holds", "differs", "depends", "not run"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SAID = {"holds": ("holds", "hold"), "differs": ("differs", "differ"), "depends": ("depends", "depend")}
MARKS: Mapping[str, str] = {"holds": "✓ holds", "differs": "✗ differs", "depends": "◐ depends", "not run": "– not run"}


@dataclass(frozen=True)
class ClaimResult:
    """A claim and its verdict. `measured` is by condition; nothing where its sources were not run: `why` says how."""

    claim: Claim
    verdict: Verdict
    measured: Mapping[str, Any]
    why: str

    @property
    def says(self) -> str:
        """What the document says and how far from it still holds, as it is shown."""
        says, tolerance = self.claim.says, self.claim.tolerance
        around = tolerance.around(says[0]) if tolerance else ""
        number = " ".join(filter(None, (RULES[self.claim.rule].sign, " to ".join(map(str, says)), around)))
        return f"{self.claim.words} ({number})" if self.claim.words else number

    @property
    def found(self) -> str:
        """What was measured, in the document's unit; once, where all conditions have the same."""
        unit = self.claim.says[0].unit
        shown = {name: quantity.in_unit(value, unit) for name, value in self.measured.items()}
        if len(set(shown.values())) <= 1:
            return next(iter(shown.values()), "–")
        return "; ".join(f"{name}: {value}" for name, value in shown.items())

    def row(self) -> dict[str, Any]:
        """For `--json` and claims.json; numbers are in ones and bytes, to twelve digits."""
        claim, says = self.claim, [one.value for one in self.claim.says]
        measured = self.measured[ALONE] if ALONE in self.measured else dict(self.measured) or None
        return {
            **{"id": claim.id, "section": claim.section, "quote": claim.quote},
            **{"says": says if len(says) > 1 else says[0], "rule": claim.rule, "measured": _plain(measured)},
            "tolerance": claim.tolerance and claim.tolerance.written,
            **{"verdict": self.verdict, "why": self.why, "shown": {"says": self.says, "measured": self.found}},
        }


def check(claims: Iterable[Claim], sources: Sources) -> Iterator[ClaimResult]:
    """The verdict on each claim; none where a project has other settings than the document, or damaged files.

    Raises UserError for a claim that needs no project and does not come to what its rule needs.
    """
    for claim in claims:
        try:
            yield _checked(claim, sources)
        except MissingArtifact as missing:
            yield ClaimResult(claim, "not run", {}, str(missing))
        except UserError as error:
            if claim.calculated:
                raise UserError(f"claim {claim.id}: {error}. Edit the claim.") from None
            yield ClaimResult(claim, "not run", {}, f"it cannot be measured on what is there: {error}")


def _checked(claim: Claim, sources: Sources) -> ClaimResult:
    values: dict[str, Any] = {}
    for name, expression in claim.values.items():
        values[name] = expression.value(values, sources.functions)
    measured = {name: one.value(values, sources.functions) for name, one in claim.measure.items()}
    found = [_holds(claim, value) for whole in measured.values() for value in _seeds(claim, whole)]
    verdict: Verdict = "holds" if all(found) else "depends" if any(found) else "differs"
    given = {**values, "measured": measured.get(ALONE, measured), "says": claim.says[0].value}
    return ClaimResult(claim, verdict, measured, quantity.filled(claim.why, given))


def _seeds(claim: Claim, value: Any) -> Sequence[Any]:
    """What the rule is held against: of several seeds the mean, or where the claim is about each, the extremes too."""
    if not isinstance(value, Spread):
        return [value]
    return list(value) if claim.each_seed else [value.mean]


def _holds(claim: Claim, value: Any) -> bool:
    """Raises UserError where a number is compared with a text."""
    said = [one.value for one in claim.says]
    if _kind(value) != _kind(said[0]):
        raise UserError(f"it measures {_kind(value)}, {value!r}, and the document says {_kind(said[0])}, {said[0]!r}")
    if claim.tolerance is None or isinstance(said[0], str):
        return RULES[claim.rule].holds(value, *said)
    margin = claim.tolerance.amount * (abs(said[0]) if claim.tolerance.relative else 1)
    return bool(abs(value - said[0]) <= margin * (1 + 1e-9))


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", str: "a text", int: "a number", float: "a number", type(None): "nothing"}
    return kinds.get(type(value), "something else")


def _plain(value: Any) -> Any:
    """For JSON: floats without the last digits; several seeds as mean, low and high."""
    if isinstance(value, Spread):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


Row = Mapping[str, Any]  # of `ClaimResult.row`


def calculated() -> list[Row]:
    """The verdicts that the calculator alone can give, on the claims that come with the program."""
    name = Claims().data
    claims = read_claims(DOCUMENT / name, name)
    return [checked.row() for checked in check((one for one in claims if one.calculated), Sources())]


def chosen(rows: Sequence[Row], section: str | None = None, verdict: str | None = None) -> list[Row]:
    """Those of a section and what is below it, and with a verdict. Raises UserError for one that there is not."""
    wanted = (section or "").removeprefix("§").rstrip(".").lower()
    found = [row for row in rows if section is None or f"{row['section'].lower()}.".startswith(f"{wanted}.")]
    if not found:
        known = ", ".join(dict.fromkeys(row["section"] for row in rows))
        raise UserError(f"section must be one of {known}, got {section!r}.")
    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"verdict must be one of {', '.join(VERDICTS)}, got {verdict!r}.")
    return [row for row in found if verdict in (None, row["verdict"])]


def summary(rows: Sequence[Row]) -> str:
    """98 claims: 61 hold, 25 differ, 9 depend, 3 not run."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    parts = [f"{n} {SAID.get(verdict, (verdict, verdict))[n != 1]}" for verdict, n in counts.items()]
    ran = parts if counts["not run"] else parts[:-1]
    return f"{len(rows)} claim{'s' * (len(rows) != 1)}: {', '.join(ran)}"


def titled(section: str) -> str:
    """A section as a heading: §2.4, or its name."""
    return f"§{section}" if section[0].isdigit() else section


def table_of(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = [("claim", "document", "measured", "verdict", "why"), ("---",) * 5, *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    shown = row["quote"], row["shown"]["says"], row["shown"]["measured"], MARKS[row["verdict"]], row["why"]
    return tuple(text.replace("|", "\\|").replace("<", "&lt;") for text in shown)
