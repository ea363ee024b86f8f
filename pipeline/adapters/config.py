"""What an adapter changes, in PEFT's words."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeVar

from pipeline.calc.target_modules import matches_suffix
from pipeline.files.patterns import block_match, end_match, full_match

Number = TypeVar("Number", int, float)
ANY_LIST = r"(?<=\.)[^.]*"  # PEFT's layers_pattern where there is none: any list that lies in another module


@dataclass(frozen=True)
class AdapterSpec:
    """`targets` get LoRA, `saved` modules train in full, `rows` train row by row.

    Names mean every module whose full name ends so, those of `saved` even within a word, as in PEFT: norm is also
    input_layernorm. A text in place of a list is a pattern that the whole name matches, or all-linear. `ranks` and
    `alphas` are by pattern: the first that a name ends with decides.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    saved: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()  # none: all
    lists: tuple[str, ...] = ()  # names of the lists whose numbers `layers` are; none: any

    def rank_of(self, module: str) -> int:
        """R of the module with this full name."""
        return _by_pattern(self.ranks, module, self.rank, "rank_pattern")

    def scale_of(self, module: str) -> float:
        """By what its BA is multiplied: alpha/R, or alpha/√R (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha, "alpha_pattern") / (
            math.sqrt(rank) if self.rslora else rank
        )

    def doubled(self) -> "AdapterSpec":
        """Twice every rank, with every scale as it is."""
        by = math.sqrt(2) if self.rslora else 2
        ranks = {name: 2 * rank for name, rank in self.ranks.items()}
        alphas = {name: by * alpha for name, alpha in self.alphas.items()}
        return replace(self, rank=2 * self.rank, alpha=by * self.alpha, ranks=ranks, alphas=alphas)

    def leaves_out(self, module: str) -> bool:
        """Whether a module that `targets` means gets no LoRA all the same."""
        if isinstance(self.excluded, str):
            excluded = full_match(self.excluded, module, "exclude_modules")
        else:
            excluded = any(matches_suffix(module, form) for form in self.excluded)
        if isinstance(self.targets, str):
            return excluded or lies_in(module, self.saved)
        numbered = bool(self.layers) and module not in self.targets
        return excluded or (numbered and self._layer(module) not in self.layers)

    def saves(self, module: str) -> bool:
        """Whether the module with this full name trains in full."""
        return any(module.endswith(name) for name in self.saved)

    def _layer(self, module: str) -> int | None:
        """The number of the block that a module is in: the first in its name."""
        found = (block_match(name, module, "layers_pattern") for name in self.lists or (ANY_LIST,))
        return next((number for number in found if number is not None), None)


def _by_pattern(values: Mapping[str, Number], module: str, default: Number, key: str) -> Number:
    return next((value for pattern, value in values.items() if end_match(pattern, module, key)), default)


def lies_in(module: str, names: Iterable[str]) -> bool:
    """Whether `names` mean the module with this full name, or one that it is in."""
    return any(matches_suffix(part, name) for part in ways_to(module) for name in names)


def ways_to(module: str) -> list[str]:
    """Full names of the module and of all that it is in: model, model.norm for model.norm."""
    return list(accumulate(module.split("."), lambda outer, inner: f"{outer}.{inner}"))
