"""data/claims.yaml: what the document claims, read and checked before anything is measured."""

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

NEEDED = ("id", "section", "quote", "says", "rule", "measure", "why")
MORE = ("words", "tolerance", "values", "seeds")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, which not every build of PyYAML has
ALONE = ""  # the condition of a claim that has no conditions


@dataclass(frozen=True)
class Rule:
    """`holds(measured, *said)`; `sign` stands before what is said, where it is shown."""

    arguments: int
    holds: Callable[..., bool]
    sign: str = ""


RULES: Mapping[str, Rule] = {
    "equal": Rule(1, lambda measured, said: measured == said),  # or within the claim's tolerance
    "between": Rule(2, lambda measured, low, high: low <= measured <= high),
    "at_least": Rule(1, lambda measured, said: measured >= said, "≥"),
    "at_most": Rule(1, lambda measured, said: measured <= said, "≤"),
    "more_than": Rule(1, lambda measured, said: measured > said, ">"),
    "less_than": Rule(1, lambda measured, said: measured < said, "<"),
}


@dataclass(frozen=True)
class Tolerance:
    """How far a measured number may be from what is said: a share of it, or a difference."""

    amount: float
    relative: bool
    written: str = ""

    def around(self, said: Quantity) -> str:
        """How far a measured number may be, as it is shown: in the document's unit, or in points."""
        if not self.relative:
            return f"± {self.written}"
        return (
            f"± {quantity.in_unit(self.amount * abs(float(said.value)), 'points' if said.unit == '%' else said.unit)}"
        )


@dataclass(frozen=True)
class Claim:
    """One statement of the document. `measure` is by condition; `values` have names, for it and for `why`."""

    id: str
    section: str
    quote: str
    says: tuple[Quantity, ...]
    rule: str
    measure: Mapping[str, Expression]
    why: str
    words: str = ""  # the document's, where the number in `says` is how they are taken
    tolerance: Tolerance | None = None
    values: Mapping[str, Expression] = field(default_factory=dict)
    each_seed: bool = False

    @property
    def calculated(self) -> bool:
        """Whether the calculator alone can tell."""
        calls = {call for one in (*self.measure.values(), *self.values.values()) for call in one.calls}
        return calls <= PLAIN.keys() | CALCULATOR.keys()


def read_claims(path: Path, name: str) -> list[Claim]:
    """Every claim, in the document's order. Raises UserError that names the claim and what is wrong in it."""
    try:
        tree = yaml.load(path.read_bytes(), LOADER)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name a file of claims that exists.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, list) or not tree:
        raise UserError(f"{name} must hold a list of claims, got {str(tree)[:60]!r}.")
    functions = Sources().functions
    claims = [_claim(entry, f"{name}: claim {number}", functions) for number, entry in enumerate(tree, 1)]
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise UserError(f"{name}: id {claim.id} stands twice. Give each claim one of its own.")
        seen.add(claim.id)
    return claims


def _claim(entry: Any, place: str, functions: Mapping[str, Function]) -> Claim:
    if not isinstance(entry, dict):
        raise UserError(f"{place} must have the keys {', '.join(NEEDED)}, got {str(entry)[:60]!r}.")
    place = f"{place} ({entry.get('id', 'no id')})"
    missing = [key for key in NEEDED if entry.get(key) in (None, "")]
    unknown = [str(key) for key in entry if key not in (*NEEDED, *MORE)]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has no key {', '.join(unknown)}"
        raise UserError(f"{place} {problem}. Keys: {', '.join(NEEDED)}; if need be {', '.join(MORE)}.")
    try:
        return _checked(entry, functions)
    except UserError as error:
        raise UserError(f"{place}: {error}. Edit the claim.") from None


def _checked(entry: Mapping[str, Any], functions: Mapping[str, Function]) -> Claim:
    for key in ("id", "quote", "why", "rule"):
        if not isinstance(entry[key], str):
            raise UserError(f"{key} must be a text, got {entry[key]!r}")
    values: dict[str, Expression] = {}
    for name, text in _mapping(entry.get("values", {}), "values").items():
        values[name] = parse(_text(text), values.keys(), functions)
    measure = entry["measure"]
    by_condition = _mapping(measure, "measure") if isinstance(measure, dict) else {ALONE: measure}
    claim = Claim(
        id=entry["id"],
        section=str(entry["section"]),
        quote=entry["quote"],
        says=_said(entry["says"], entry["rule"]),
        rule=entry["rule"],
        measure={name: parse(_text(text), values.keys(), functions) for name, text in by_condition.items()},
        why=" ".join(entry["why"].split()),
        words=str(entry.get("words", "")),
        tolerance=_tolerance(entry.get("tolerance"), entry["rule"]),
        values=values,
        each_seed=_seeds(entry.get("seeds", "mean")),
    )
    quantity.check_template(claim.why, (*values, "measured", "says"))
    return claim


def _text(value: Any) -> str:
    """An expression; YAML reads a bare number as one."""
    if not isinstance(value, str | int | float):
        raise UserError(f"a measure must be an expression, got {value!r}")
    return str(value)


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise UserError(f"{key} must be names with an expression each, got {value!r}")
    return value


def _said(written: Any, rule: str) -> tuple[Quantity, ...]:
    """What the document says: one quantity, or as many as the rule needs."""
    if rule not in RULES:
        raise UserError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    found = tuple(map(quantity.read, written if isinstance(written, list) else [written]))
    if len(found) != RULES[rule].arguments:
        raise UserError(f"rule {rule} needs {RULES[rule].arguments} in `says`, got {len(found)}")
    if rule != "equal" and any(isinstance(one.value, str | bool) for one in found):
        raise UserError(f"rule {rule} compares numbers, got {written!r}")
    if not all(isinstance(one.value, str | bool | int | float) for one in found):
        raise UserError(f"says must be a number, a text, true or false, got {written!r}")
    return found


def _tolerance(written: Any, rule: str) -> Tolerance | None:
    """5% is a share of what is said; 15 points, or a number, a difference."""
    if written is None:
        return None
    found = quantity.read(written)
    if isinstance(found.value, str | bool) or found.value <= 0 or rule != "equal":
        raise UserError(f"tolerance belongs to rule equal and is such as 5%, 15 points or 0.5, got {written!r}")
    return Tolerance(found.value, found.unit == "%", str(written))


def _seeds(written: Any) -> bool:
    if written not in ("mean", "each"):
        raise UserError(f"seeds must be mean or each, got {written!r}")
    return bool(written == "each")
