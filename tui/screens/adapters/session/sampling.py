"""Sampling settings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields

from pipeline.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_k 0 and top_p 1 are off. `limit`: maximum tokens; `k`: rows of the top-k table."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    limit: int = 20
    k: int = 5

    def __str__(self) -> str:
        cuts = [f"top-k {self.top_k}"] * (self.top_k > 0) + [f"top-p {self.top_p:g}"] * (self.top_p < 1)
        parts = [f"temperature {self.temperature:g}", *cuts, f"seed {self.seed}"] if self.temperature else ["greedy"]
        return " · ".join([*parts, f"{self.limit} tokens", f"{self.k} candidates"])

    def fields(self) -> dict[str, float | int]:
        """The arguments of the engine's `generate`."""
        return {name: value for name, value in asdict(self).items() if name != "k"}


# name → (rule in words, test)
RULES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number from 0", lambda value: 0 <= value < math.inf),
    "top_k": ("a whole number from 0 (0 cuts nothing)", lambda value: value >= 0),
    "top_p": ("above 0 up to 1 (1 cuts nothing)", lambda value: 0 < value <= 1),
    "seed": ("a whole number below 2^63", lambda value: 0 <= value < 2**63),
    "limit": ("a whole number from 1 to 10000", lambda value: 1 <= value <= 10_000),
    "k": ("a whole number from 1 to 50", lambda value: 1 <= value <= 50),
}


def parse(texts: Mapping[str, str]) -> Sampling:
    """Parse typed values. Raises UserError with name, rule and value of the first invalid one."""
    values = {}
    for field in fields(Sampling):
        text = texts[field.name].strip()
        rule, allowed = RULES[field.name]
        try:
            value = float(text) if field.type is float else int(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise UserError(f"{field.name.replace('_', '-')} must be {rule}, got {text!r}.")
        values[field.name] = value
    return Sampling(**values)  # type: ignore[arg-type]  # whole numbers are parsed as such
