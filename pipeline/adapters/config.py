"""What an adapter changes, in PEFT's terms: `AdapterSpec` and its file, adapter_config.json.

It is written as PEFT writes it. On reading, an option that is not supported is rejected: an ignored
one would give another model than the one that was trained.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any, TypeVar

from pipeline.calc.target_modules import matches_suffix
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.patterns import (
    block_match,
    block_pattern,
    end_match,
    end_pattern,
    full_match,
    problem,
)
from pipeline.files.text import abbreviate_repr

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # an adapter's files
MODEL = "config.json"  # in the folder of a full model instead of CONFIG
PREFIX = "base_model.model."  # of the names of tensors in WEIGHTS
LORA = "LORA"  # PEFT's `peft_type` of LoRA and DoRA
# the first version of PEFT that stores experts' A and B as `ExpertUpdate` does
LAYOUT = "0.19.1"
# PEFT's types that change no weight
VIRTUAL = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
# Weights of a linear below which its update is folded in: two calls in place of four, 1.89 → 1.56
# ms per step on MiniGPT. Above, backward would form a gradient of W's size, which LoRA exists to
# avoid.
FOLD_BELOW = 2**16
OTHER_KINDS: dict[str, str] = {}
"""PEFT's types of other methods → the module with `load(model, base_folder, folder)`.

`pipeline.stages.registry` fills it.
"""
Number = TypeVar("Number", int, float)
ANY_LIST = r"(?<=\.)[^.]*"  # PEFT's default layers_pattern: any module list inside another module

# PEFT's options that change what an adapter computes, each with its only supported value.
_PLAIN: dict[str, Any] = {"bias": "none", "lora_bias": False}
# PEFT's other options that may be set: those that are read, then those without effect on a trained
# adapter.
_KNOWN = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "fan_in_fan_out",  # for GPT-2's layers; PEFT corrects it itself, whatever the file says
    # initializations: see _KEEPS_BASE
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
}
EMBEDDING = "embed_tokens"  # the module that a list of trainable_token_indices means in most models
# Initializations that leave the base's weights unchanged: EVA and MiCA start at BA = 0 with their
# own A or B.
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Far beyond any value in use, and well within what fp32 can multiply.
_RANKS, _ALPHAS = (1, 10**6), (1e-9, 1e9)
# Each name is compared with each module's. A list of all linears of 48 layers with 128 experts has
# 18,500.
MOST_NAMES = 20_000
MOST_PATTERNS = 5_000  # in rank_pattern or alpha_pattern; compiling one takes 0.1 ms


class Unsupported(UserError):
    """An adapter of a kind, or with an option, that PEFT has and this project does not read."""


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter changes.

    A name matches every module whose full name ends with it. A string in place of a list of names
    is a pattern for full names, or all-linear.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str  # layers that get LoRA
    # Modules that train in full. A name matches even within a word, as in PEFT: norm also matches
    # input_layernorm.
    saved: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # that train, by module
    # Exceptions from `rank` and `alpha`. The first pattern that matches the end of a name applies.
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0  # of training; a stored adapter is read without
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()  # empty: all
    lists: tuple[str, ...] = ()  # names of the module lists that `layers` index; empty: any
    # Stacked experts that get LoRA, by the end of their full names; neither `excluded` nor `layers`
    # apply to them.
    parameters: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank of the module with this full name."""
        return _by_pattern(self.ranks, module, self.rank, "rank_pattern")

    def scale_of(self, module: str) -> float:
        """The scale s of its BA: alpha/R, or with rsLoRA alpha/√R (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alphas, module, self.alpha, "alpha_pattern")
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def doubled(self) -> "AdapterSpec":
        """Every rank doubled, and alphas so that every scale stays the same."""
        factor = math.sqrt(2) if self.rslora else 2
        ranks = {name: 2 * rank for name, rank in self.ranks.items()}
        alphas = {name: factor * alpha for name, alpha in self.alphas.items()}
        return replace(
            self, rank=2 * self.rank, alpha=factor * self.alpha, ranks=ranks, alphas=alphas
        )

    def excludes(self, module: str) -> bool:
        """Whether a module that `targets` matches gets no LoRA."""
        if isinstance(self.excluded, str):
            excluded = full_match(self.excluded, module, "exclude_modules")
        else:
            excluded = any(matches_suffix(module, form) for form in self.excluded)
        # a pattern may match what trains in full, which PEFT then leaves out
        if isinstance(self.targets, str):
            return excluded or lies_in(module, self.saved)
        # in PEFT a full name is adapted in whatever block it is
        if not self.layers or module in self.targets:
            return excluded
        numbers = (
            block_match(name, module, "layers_pattern") for name in self.lists or (ANY_LIST,)
        )
        # the first number in the name: that of the block that contains the module
        block = next((number for number in numbers if number is not None), None)
        return excluded or block not in self.layers

    def saves(self, module: str) -> bool:
        """Whether the module with this full name trains in full."""
        # PEFT's own rule for modules_to_save: a plain end of the name, where target_modules needs a
        # whole part of it
        return any(module.endswith(name) for name in self.saved)


def _by_pattern(values: Mapping[str, Number], module: str, default: Number, key: str) -> Number:
    return next(
        (value for pattern, value in values.items() if end_match(pattern, module, key)), default
    )


def lies_in(module: str, names: Iterable[str]) -> bool:
    """Whether one of `names` matches this module's full name, or that of a module around it."""
    return any(matches_suffix(*pair) for pair in product(enclosing_names(module), names))


def enclosing_names(module: str) -> list[str]:
    """Full names of the module and of all around it, outermost first: model, model.norm."""
    return list(accumulate(module.split("."), lambda outer, inner: f"{outer}.{inner}"))


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError, which says if the folder is something else."""
    artifact.refuse_untrusted(folder)
    # what else it may be, before read_json says only that a file is missing
    if not (folder / CONFIG).exists():
        if (folder / MODEL).is_file():
            raise UserError(
                f"{folder} is a full model, not an adapter: it needs no base, and there is nothing "
                f"to merge. Use it directly: `lora prompt --base {folder}`."
            )
        if inside := sorted(path.parent for path in folder.glob(f"*/{CONFIG}")):
            raise UserError(
                f"{folder} contains adapters but is not one. Name one of them, such as {inside[0]}."
            )
    return artifact.read_json(folder / CONFIG, f"An adapter folder holds {CONFIG} and {WEIGHTS}")


def config_of(spec: AdapterSpec, base_name: str, transposed: bool) -> dict[str, Any]:
    """adapter_config.json; `transposed`: whether layers store their weights as GPT-2's Conv1D."""
    config = {
        "peft_type": LORA,
        **_PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": _to_integer(spec.alpha),
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "rank_pattern": dict(spec.ranks),
        "alpha_pattern": {name: _to_integer(alpha) for name, alpha in spec.alphas.items()},
        "lora_dropout": spec.dropout,
        "fan_in_fan_out": transposed,  # PEFT warns where it differs from the layers
        # whatever it started from: another value may make PEFT change the base again
        "init_lora_weights": True,
        # null would mean PEFT's default for the model
        "target_modules": _to_json(spec.targets) or [],
        "exclude_modules": _to_json(spec.excluded),
        "layers_to_transform": list(spec.layers) or None,
        "layers_pattern": list(spec.lists) or None,
        "modules_to_save": list(spec.saved) or None,
        "trainable_token_indices": {name: list(ids) for name, ids in spec.rows.items()} or None,
    }
    # PEFT below 0.17 does not know the first key; the second tells how A and B are stored
    if spec.parameters:
        config |= {"target_parameters": list(spec.parameters), "peft_version": LAYOUT}
    return config


def _to_integer(number: float) -> float:
    """An alpha of 8.0 as 8, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number


def _to_json(names: tuple[str, ...] | str) -> list[str] | str | None:
    return names if isinstance(names, str) else list(names) or None


def read_spec(folder: Path, embedding: str = EMBEDDING) -> AdapterSpec:
    """`AdapterConfig.spec` of the adapter in `folder`. Raises UserError."""
    return AdapterConfig.read(folder).spec(embedding)


def refuse_experts(folder: Path, spec: AdapterSpec) -> None:
    """Raises UserError for an adapter on stacked experts, whose factors only PEFT tells apart."""
    if spec.parameters:
        raise UserError(
            f"{folder} adapts experts (target_parameters {', '.join(spec.parameters)}), which only "
            "PEFT, llama.cpp and this project read as an adapter. Merge it: "
            "`lora export --format merged`."
        )


def refuse_options(
    config: Mapping[str, Any], path: Path, plain: Mapping[str, Any], known: Collection[str]
) -> None:
    """Raises UserError for another value of a `plain` option, and for an option not `known`."""
    for key, supported in plain.items():
        value = config.get(key) or supported
        if value != supported:
            raise Unsupported(
                f"{path}: {key} is {abbreviate_repr(value, 200)}; only {supported!r} is supported "
                "so far."
            )
    for key in sorted(config.keys() - plain.keys() - {*known}):
        if config[key]:
            raise Unsupported(
                f"{path}: {key} is {abbreviate_repr(config[key], 200)}; it is not supported so far."
            )


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json, whose values are checked when they are asked for. Raises UserError."""

    values: dict[str, Any]
    path: Path

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        return cls(read_config(folder), folder / CONFIG)

    def get(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def kind(self) -> str:
        """PEFT's type of the adapter."""
        return str(self.get("peft_type") or LORA)

    def refuse_other_kinds(self) -> None:
        """Raises UserError for an adapter that is no LoRA: of virtual tokens, or of a method's."""
        folder = self.path.parent
        if self.kind in OTHER_KINDS:
            raise Unsupported(
                f"{folder} is an adapter of type {self.kind}: only LoRA can be merged, combined, "
                "compared or served by vLLM. Use it on its base with `lora prompt --adapter`, or "
                "with PEFT."
            )
        if self.kind in VIRTUAL:
            kind, count = VIRTUAL[self.kind], self.get("num_virtual_tokens")
            raise Unsupported(
                f"{folder} is a {kind} of {count} virtual tokens: it changes no weights, so there "
                "is nothing to merge, combine or compare, and vLLM cannot serve it. Use it on its "
                "base with `lora prompt --adapter`, or with PEFT."
            )

    def spec(self, embedding: str = EMBEDDING) -> AdapterSpec:
        """What the adapter changes; `embedding`: the last part of the embedding's name.

        Raises UserError for an option that is invalid or not supported.
        """
        self._refuse_options()
        ranks, alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        return AdapterSpec(
            rank=self._number("r", self.get("r"), whole=True),
            alpha=self._number("lora_alpha", self.get("lora_alpha")),
            targets=self.names(
                "target_modules", needed=not self.get("target_parameters"), may_be_pattern=True
            ),
            saved=self.names("modules_to_save"),
            rows=self._rows(embedding),
            ranks={key: self._number("rank_pattern", n, whole=True) for key, n in ranks.items()},
            alphas={key: self._number("alpha_pattern", n) for key, n in alphas.items()},
            rslora=bool(self.get("use_rslora")),
            dora=bool(self.get("use_dora")),
            excluded=self.names("exclude_modules", may_be_pattern=True),
            layers=self._layers(),
            lists=self._lists(),
            parameters=self.names("target_parameters"),
        )

    def _refuse_options(self) -> None:
        if self.kind != LORA:
            *others, last = LORA, *OTHER_KINDS, *VIRTUAL
            kind = self.get("peft_type")
            raise Unsupported(
                f"{self.path}: peft_type must be {', '.join(others)} or {last}, got "
                f"{abbreviate_repr(kind, 200)}. Train one of these, or convert the adapter with "
                "PEFT's save_as_lora if its method allows that."
            )
        init = self.values.get("init_lora_weights", True)
        # PEFT's names have no case
        if (init.lower() if isinstance(init, str) else init) not in _KEEPS_BASE:
            convert = (
                "Convert the adapter in PEFT with "
                "save_pretrained(path_initial_model_for_weight_conversion=...)."
            )
            if init == "loftq":  # whose base PEFT converts nothing to
                convert = (
                    "Merge it in PEFT with merge_and_unload, and use the merged model as a base."
                )
            raise Unsupported(
                f"{self.path}: init_lora_weights is {abbreviate_repr(init)}, which also changes "
                f"the base. {convert}"
            )
        refuse_options(self.values, self.path, _PLAIN, _KNOWN)

    def _number(self, key: str, value: Any, whole: bool = False) -> Any:
        kinds, (least, most) = (int, _RANKS) if whole else ((int, float), _ALPHAS)
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise self._invalid(key, f"a {'whole ' * whole}number from {least} to {most}", value)
        return value if whole else float(value)

    def names(self, key: str, needed: bool = False, may_be_pattern: bool = False) -> Any:
        """A tuple of names, or a pattern as a string; without `may_be_pattern` that is a name."""
        value = self.get(key) or []
        if isinstance(value, str):
            return self._pattern(key, value) if may_be_pattern else (value,)
        if not _is_list_of(value, str) or (needed and not value):
            raise self._invalid(key, "a list of names", self.get(key))
        if len(value) > MOST_NAMES:
            raise self._invalid(key, f"at most {MOST_NAMES:,} names", len(value))
        return tuple(sorted(value))

    def _patterns(self, key: str) -> dict[str, Any]:
        value = self.get(key) or {}
        if not isinstance(value, dict):
            raise self._invalid(key, "a mapping of names to numbers", value)
        if len(value) > MOST_PATTERNS:
            raise self._invalid(key, f"at most {MOST_PATTERNS:,} patterns", len(value))
        return {
            self._pattern(key, name, end_pattern(name)): number for name, number in value.items()
        }

    def _pattern(self, key: str, pattern: str, full_pattern: str | None = None) -> str:
        """`pattern`, if it and the `full_pattern` built from it are valid regular expressions."""
        if why := problem(pattern) or problem(full_pattern or pattern):
            raise self._invalid(key, f"a regular expression ({why})", pattern)
        return pattern

    def _lists(self) -> tuple[str, ...]:
        key = "layers_pattern"
        return tuple(self._pattern(key, name, block_pattern(name)) for name in self.names(key))

    def _layers(self) -> tuple[int, ...]:
        value = self.get("layers_to_transform")
        if value is None:
            return ()
        numbers = value if isinstance(value, list) else [value]
        if not _is_list_of(numbers, int):
            raise self._invalid("layers_to_transform", "the numbers of blocks", value)
        return tuple(numbers)

    def _rows(self, embedding: str) -> dict[str, tuple[int, ...]]:
        value = self.get("trainable_token_indices") or {}
        indices = {embedding: value} if isinstance(value, list) else value
        if not isinstance(indices, dict):
            raise self._invalid("trainable_token_indices", "a mapping of modules to rows", value)
        for name, ids in indices.items():
            if not ids or not _is_list_of(ids, int) or min(ids) < 0:
                key = f"trainable_token_indices.{name}"
                raise self._invalid(key, "a list of rows, at least one, each from 0", ids)
        return {name: tuple(ids) for name, ids in indices.items()}

    def _invalid(self, key: str, rule: str, value: Any) -> UserError:
        return UserError(f"{self.path}: {key} must be {rule}, got {abbreviate_repr(value, 200)}.")


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in values
    )
