"""adapter_config.json ↔ AdapterSpec: written as PEFT writes it, read field by field or refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.folder import CONFIG, VIRTUAL, read_config
from pipeline.errors import UserError
from pipeline.files.patterns import block_pattern, end_pattern, problem

KIND = "LORA"
# PEFT's options that change what an adapter computes, each with the only value that is understood here ...
_PLAIN: dict[str, Any] = {"bias": "none", "lora_bias": False}
# ... those that are read, and those that decide nothing once an adapter is trained. Any other must be empty.
_READ = {
    "peft_type",
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
}
_HARMLESS = {
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
    "fan_in_fan_out",  # of GPT-2's layers; PEFT sets it right itself, whatever the file says
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # of how A and B began: see _KEEPS_BASE
}
EMBEDDING = "embed_tokens"  # what PEFT's list of rows means in most models
# Initialisations that leave the base's weights as they are: EVA and MiCA begin at BA = 0 with an A or a B of their own.
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Far outside of what anybody trains, and far inside of what fp32 can multiply with.
_RANKS, _ALPHAS = (1, 10**6), (1e-9, 1e9)


def config_of(spec: AdapterSpec, base_name: str, transposed: bool) -> dict[str, Any]:
    """adapter_config.json; `fan_in_fan_out` says whether the layers store their weights as GPT-2's do."""
    return {
        "peft_type": KIND,
        **_PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": _whole(spec.alpha),
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "rank_pattern": dict(spec.ranks),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in spec.alphas.items()},
        "lora_dropout": 0.0,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "target_modules": _listed(spec.targets),
        "exclude_modules": _listed(spec.excluded),
        "layers_to_transform": list(spec.layers) or None,
        "layers_pattern": list(spec.lists) or None,
        "modules_to_save": list(spec.saved) or None,
        "trainable_token_indices": {name: list(ids) for name, ids in spec.rows.items()} or None,
    }


def _whole(number: float) -> float:
    """PEFT's alpha is a whole number where it can be."""
    return int(number) if float(number).is_integer() else number


def _listed(names: tuple[str, ...] | str) -> list[str] | str | None:
    return names if isinstance(names, str) else list(names) or None


def read_spec(folder: Path, embedding: str = EMBEDDING) -> AdapterSpec:
    """What the adapter in `folder` says it changes; `embedding` is the last name of the model's own.

    Raises UserError for all that is not understood.
    """
    config = _Config(read_config(folder), folder / CONFIG)
    config.refuse_options()
    return AdapterSpec(
        rank=config.number("r", config.get("r"), whole=True),
        alpha=config.number("lora_alpha", config.get("lora_alpha")),
        targets=config.names("target_modules", needed=True, may_be_pattern=True),
        saved=tuple(config.names("modules_to_save")),
        rows=config.rows(embedding),
        ranks={key: config.number("rank_pattern", n, whole=True) for key, n in config.pattern("rank_pattern").items()},
        alphas={key: config.number("alpha_pattern", n) for key, n in config.pattern("alpha_pattern").items()},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        excluded=config.names("exclude_modules", may_be_pattern=True),
        layers=config.layers(),
        lists=config.lists(),
    )


@dataclass(frozen=True)
class _Config:
    """The file's values; each is given out once it is what it must be. Raises UserError."""

    values: dict[str, Any]
    place: Path

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def refuse_options(self) -> None:
        kind = self.get("peft_type") or KIND
        if kind != KIND:
            raise UserError(
                f"{self.place}: peft_type must be {KIND}, {' or '.join(VIRTUAL)}, got {_short(kind)}. Train one of "
                "these, or convert the adapter with PEFT's save_as_lora if its method allows that."
            )
        if self.values.get("init_lora_weights", True) not in _KEEPS_BASE:
            raise UserError(
                f"{self.place}: init_lora_weights is {self.get('init_lora_weights')!r}, which also changes the base. "
                "Convert the adapter in PEFT with save_pretrained(path_initial_model_for_weight_conversion=...)."
            )
        for key, plain in _PLAIN.items():
            if (self.get(key) or plain) != plain:
                raise UserError(f"{self.place}: {key} is {self.get(key)!r}; only {plain!r} is supported so far.")
        for key in sorted(self.values.keys() - _PLAIN.keys() - _READ - _HARMLESS):
            if self.get(key):
                raise UserError(f"{self.place}: {key} is {self.get(key)!r}; it is not supported so far.")

    def number(self, key: str, value: Any, whole: bool = False) -> Any:
        kinds, (least, most) = (int, _RANKS) if whole else ((int, float), _ALPHAS)
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(key, f"a {'whole ' * whole}number from {least} to {most}", value)
        return value if whole else float(value)

    def names(self, key: str, needed: bool = False, may_be_pattern: bool = False) -> Any:
        """A tuple of names, or a pattern's text; a lone text is a name where no pattern may be."""
        value = self.get(key) or []
        if isinstance(value, str):
            if not may_be_pattern:
                return (value,)
            return self._pattern(key, value)
        if not _all(value, str) or (needed and not value):
            raise self._wrong(key, "a list of names", self.get(key))
        return tuple(sorted(value))

    def pattern(self, key: str) -> dict[str, Any]:
        value = self.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, "a mapping of names to numbers", value)
        return {self._pattern(key, name, end_pattern(name)): number for name, number in value.items()}

    def _pattern(self, key: str, pattern: str, whole: str | None = None) -> str:
        """The pattern, once it is one, and so is the `whole` that it is made part of."""
        if why := problem(pattern) or problem(whole or pattern):
            raise self._wrong(key, f"a regular expression ({why})", pattern)
        return pattern

    def lists(self) -> tuple[str, ...]:
        key = "layers_pattern"
        return tuple(self._pattern(key, name, block_pattern(name)) for name in self.names(key))

    def layers(self) -> tuple[int, ...]:
        value = self.get("layers_to_transform")
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        if not _all(numbers, int):
            raise self._wrong("layers_to_transform", "the numbers of blocks", value)
        return tuple(numbers)

    def rows(self, embedding: str) -> dict[str, tuple[int, ...]]:
        value = self.get("trainable_token_indices") or {}
        indices = {embedding: value} if isinstance(value, list) else value
        if not isinstance(indices, dict):
            raise self._wrong("trainable_token_indices", "a mapping of modules to rows", value)
        for name, ids in indices.items():
            if not _all(ids, int) or min(ids, default=0) < 0:
                raise self._wrong(f"trainable_token_indices.{name}", "a list of rows", ids)
        return {name: tuple(ids) for name, ids in indices.items()}

    def _wrong(self, key: str, rule: str, value: Any) -> UserError:
        return UserError(f"{self.place}: {key} must be {rule}, got {_short(value)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
