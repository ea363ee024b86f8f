"""What an adapter changes, in PEFT's terms."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeVar

from pipeline.calc.target_modules import matches_suffix
from pipeline.files.patterns import block_match, end_match, full_match

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # an adapter's files
LORA = "LORA"  # PEFT's `peft_type` of LoRA and DoRA
VIRTUAL = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}  # its types that change no weight
OTHER_KINDS: dict[str, str] = {}
"""Further types → the module with `load(model, base_folder, folder)`. A registry above fills it from its methods."""
Number = TypeVar("Number", int, float)
ANY_LIST = r"(?<=\.)[^.]*"  # PEFT's default layers_pattern: any module list inside another module


@dataclass(frozen=True)
class AdapterSpec:
    """`targets` get LoRA, `saved` modules train in full, `rows` train row by row.

    A name matches every module whose full name ends with it; in `saved` even within a word, as in PEFT: norm also
    matches input_layernorm. A string instead of a list is a pattern for the full name, or all-linear. The keys of
    `ranks` and `alphas` are patterns: the first that matches the end of a name applies.
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
    layers: tuple[int, ...] = ()  # empty: all
    lists: tuple[str, ...] = ()  # names of the module lists that `layers` index; empty: any

    def rank_of(self, module: str) -> int:
        """The rank of the module with this full name."""
        return _by_pattern(self.ranks, module, self.rank, "rank_pattern")

    def scale_of(self, module: str) -> float:
        """The scale s of its BA: alpha/R, or with rsLoRA alpha/√R (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha, "alpha_pattern") / (
            math.sqrt(rank) if self.rslora else rank
        )

    def doubled(self) -> "AdapterSpec":
        """Every rank doubled, and alphas so that every scale stays the same."""
        factor = math.sqrt(2) if self.rslora else 2
        ranks = {name: 2 * rank for name, rank in self.ranks.items()}
        alphas = {name: factor * alpha for name, alpha in self.alphas.items()}
        return replace(self, rank=2 * self.rank, alpha=factor * self.alpha, ranks=ranks, alphas=alphas)

    def excludes(self, module: str) -> bool:
        """Whether a module that `targets` matches gets no LoRA."""
        if isinstance(self.excluded, str):
            excluded = full_match(self.excluded, module, "exclude_modules")
        else:
            excluded = any(matches_suffix(module, form) for form in self.excluded)
        if isinstance(self.targets, str):
            return excluded or lies_in(module, self.saved)
        if not self.layers or module in self.targets:
            return excluded
        # the number of the block that contains the module: the first in its name
        numbers = (block_match(name, module, "layers_pattern") for name in self.lists or (ANY_LIST,))
        return excluded or next((number for number in numbers if number is not None), None) not in self.layers

    def saves(self, module: str) -> bool:
        """Whether the module with this full name trains in full."""
        return any(module.endswith(name) for name in self.saved)


def _by_pattern(values: Mapping[str, Number], module: str, default: Number, key: str) -> Number:
    return next((value for pattern, value in values.items() if end_match(pattern, module, key)), default)


def lies_in(module: str, names: Iterable[str]) -> bool:
    """Whether one of `names` matches this module's full name, or that of a module around it."""
    return any(matches_suffix(part, name) for part in enclosing_names(module) for name in names)


def enclosing_names(module: str) -> list[str]:
    """Full names of the module and of all around it, outermost first: model, model.norm for model.norm."""
    return list(accumulate(module.split("."), lambda outer, inner: f"{outer}.{inner}"))
