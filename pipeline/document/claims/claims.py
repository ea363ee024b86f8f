"""Reads data/claims.yaml and checks every claim before anything is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.document.claims import quantity
from pipeline.document.claims.expression import Expression, Function, parse
from pipeline.document.claims.quantity import Quantity
from pipeline.document.claims.sources import CALCULATOR, PLAIN, Sources
from pipeline.errors import UserError

REQUIRED = ("id", "section", "quote", "says", "rule", "measure", "why")
OPTIONAL = ("words", "tolerance", "values", "seeds")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is faster, but not in every build of PyYAML
ALONE = ""  # the key in `measure` of a claim without conditions


@dataclass(frozen=True)
class Rule:
    """`holds(measured, *says)` takes `arguments` values of `says`; `sign` is shown before them."""

    arguments: int
    holds: Callable[..., bool]
    sign: str = ""


RULES: Mapping[str, Rule] = {
    "equal": Rule(1, lambda measured, says: measured == says),  # or within the claim's tolerance
    "between": Rule(2, lambda measured, low, high: low <= measured <= high),
    "at_least": Rule(1, lambda measured, says: measured >= says, "≥"),
    "at_most": Rule(1, lambda measured, says: measured <= says, "≤"),
    "more_than": Rule(1, lambda measured, says: measured > says, ">"),
    "less_than": Rule(1, lambda measured, says: measured < says, "<"),
}


@dataclass(frozen=True)
class Tolerance:
    """The allowed distance from the document's number: `amount`, times that number if `relative`."""

    amount: float
    relative: bool
    written: str = ""

    def format_margin(self, says: Quantity) -> str:
        """Such as "± 0.8 GB": in the document's unit, or in points if that is %."""
        if not self.relative:
            return f"± {self.written}"
        unit = "points" if says.unit == "%" else says.unit
        return f"± {quantity.in_unit(self.amount * abs(float(says.value)), unit)}"


@dataclass(frozen=True)
class Claim:
    """One statement of the document. `measure`: condition → expression; `values`: named expressions for `measure` and
    `why`."""

    id: str
    section: str
    quote: str
    says: tuple[Quantity, ...]
    rule: str
    measure: Mapping[str, Expression]
    why: str
    words: str = ""  # the document's wording, if `says` is our reading of it as a number
    tolerance: Tolerance | None = None
    values: Mapping[str, Expression] = field(default_factory=dict)
    each_seed: bool = False

    @property
    def calculated(self) -> bool:
        """Whether the claim needs only the calculator and no project."""
        expressions = (*self.measure.values(), *self.values.values())
        calls = {call for expression in expressions for call in expression.calls}
        return calls <= PLAIN.keys() | CALCULATOR.keys()


def read_claims(path: Path, name: str) -> list[Claim]:
    """Every claim, in the document's order. Raises UserError with the claim's number, its id and the problem."""
    try:
        tree = yaml.load(path.read_bytes(), LOADER)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name an existing file of claims.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, list) or not tree:
        raise UserError(f"{name} must hold a list of claims, got {str(tree)[:60]!r}.")
    functions = Sources().functions
    claims = [_read_claim(entry, f"{name}: claim {number}", functions) for number, entry in enumerate(tree, 1)]
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise UserError(f"{name}: the id {claim.id} is used twice. Give each claim its own id.")
        seen.add(claim.id)
    return claims


def _read_claim(entry: Any, location: str, functions: Mapping[str, Function]) -> Claim:
    if not isinstance(entry, dict):
        raise UserError(f"{location} must have the keys {', '.join(REQUIRED)}, got {str(entry)[:60]!r}.")
    location = f"{location} ({entry.get('id', 'no id')})"
    missing = [key for key in REQUIRED if entry.get(key) in (None, "")]
    unknown = [str(key) for key in entry if key not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {', '.join(unknown)}"
        raise UserError(f"{location} {problem}. Required keys: {', '.join(REQUIRED)}; optional: {', '.join(OPTIONAL)}.")
    try:
        return _parse_claim(entry, functions)
    except UserError as error:
        raise UserError(f"{location}: {error}. Edit the claim.") from None


def _parse_claim(entry: Mapping[str, Any], functions: Mapping[str, Function]) -> Claim:
    for key in ("id", "quote", "why", "rule"):
        if not isinstance(entry[key], str):
            raise UserError(f"{key} must be a text, got {entry[key]!r}")
    values: dict[str, Expression] = {}
    for name, text in _mapping(entry.get("values", {}), "values").items():
        values[name] = parse(_expression_text(text), values.keys(), functions)
    measure = entry["measure"]
    by_condition = _mapping(measure, "measure") if isinstance(measure, dict) else {ALONE: measure}
    claim = Claim(
        id=entry["id"],
        section=str(entry["section"]),
        quote=entry["quote"],
        says=_read_says(entry["says"], entry["rule"]),
        rule=entry["rule"],
        measure={name: parse(_expression_text(text), values.keys(), functions) for name, text in by_condition.items()},
        why=" ".join(entry["why"].split()),
        words=str(entry.get("words", "")),
        tolerance=_read_tolerance(entry.get("tolerance"), entry["rule"]),
        values=values,
        each_seed=_each_seed(entry.get("seeds", "mean")),
    )
    quantity.check_template(claim.why, (*values, "measured", "says"))
    return claim


def _expression_text(value: Any) -> str:
    """The text of an expression. YAML reads a bare number, such as `measure: 4`, as a number."""
    if not isinstance(value, str | int | float):
        raise UserError(f"a measure must be an expression, got {value!r}")
    return str(value)


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise UserError(f"{key} must map names to expressions, got {value!r}")
    return value


def _read_says(written: Any, rule: str) -> tuple[Quantity, ...]:
    """The document's quantities, as many as the rule takes."""
    if rule not in RULES:
        raise UserError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    says = tuple(map(quantity.read, written if isinstance(written, list) else [written]))
    if len(says) != RULES[rule].arguments:
        raise UserError(f"rule {rule} needs {RULES[rule].arguments} in `says`, got {len(says)}")
    if rule != "equal" and any(isinstance(said.value, str | bool) for said in says):
        raise UserError(f"rule {rule} compares numbers, got {written!r}")
    if not all(isinstance(said.value, str | bool | int | float) for said in says):
        raise UserError(f"says must be a number, a text, true or false, got {written!r}")
    return says


def _read_tolerance(written: Any, rule: str) -> Tolerance | None:
    """5% is relative to the document's number; 15 points or a plain number is an absolute difference."""
    if written is None:
        return None
    tolerance = quantity.read(written)
    if isinstance(tolerance.value, str | bool) or tolerance.value <= 0 or rule != "equal":
        raise UserError(
            f"tolerance must be a positive number such as 5%, 15 points or 0.5, with rule equal, got {written!r}"
        )
    return Tolerance(tolerance.value, tolerance.unit == "%", str(written))


def _each_seed(written: Any) -> bool:
    if written not in ("mean", "each"):
        raise UserError(f"seeds must be mean or each, got {written!r}")
    return bool(written == "each")
