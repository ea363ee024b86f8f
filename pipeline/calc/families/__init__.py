"""Builds the shapes of a Hugging Face `config.json`.

A family is a function from a Config to an Architecture, listed under its `model_type` in FAMILIES
of a module in this folder; the modules are found, not listed. Defaults are those of transformers,
which leaves them out of its files.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture
from pipeline.errors import UserError
from pipeline.extensions import Registry
from pipeline.files.text import abbreviate_repr

MAX_SIZE = 2**31 - 1  # larger than any dimension of a tensor on a GPU
MOST_LAYERS = 10_000


class UnsupportedLayer(UserError):
    """An architecture or layer that no family builds; safetensors headers still give its shapes."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"{why} Give the folder of its .safetensors files instead: their headers contain "
            "every shape."
        )


class Config:
    """Values of the config `source`; a missing key gives the default.

    Raises UserError for an invalid value.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self.source = values, source

    def size(
        self, *keys: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE
    ) -> int:
        """An integer from `least` to `most`, from the first of `keys` that is there.

        Raises UserError.
        """
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(
                    f"{self.source}: {key} must be a whole number from {least} to {most:,}, got "
                    f"{abbreviate_repr(value)}."
                )
            return value
        if default is None:
            raise UserError(
                f"{self.source}: {keys[0]} is missing, and the shapes depend on it. Add it."
            )
        return default

    def count(self, key: str, default: int, most: int = MAX_SIZE) -> int:
        """As `size`, but 0 is valid."""
        return self.size(key, default=default, least=0, most=most)

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(
                f"{self.source}: {key} must be true or false, got {abbreviate_repr(value)}."
            )
        return default if value is None else value

    def share(self, key: str, default: float) -> float:
        """A number above 0 and at most 1."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise UserError(
                f"{self.source}: {key} must be more than 0 and at most 1, got "
                f"{abbreviate_repr(value)}."
            )
        return float(value)

    def layers(self, key: str, count: int) -> set[int]:
        """A set of layer indices below `count`."""
        value = self.get(key, [])
        valid = isinstance(value, list) and all(type(n) is int and 0 <= n < count for n in value)
        if not valid:
            raise UserError(
                f"{self.source}: {key} must list layers from 0 to {count - 1}, got "
                f"{abbreviate_repr(value)}."
            )
        return set(value)

    def layer_types(self, key: str, count: int, supported: Sequence[str]) -> list[str]:
        """The kinds of the `count` layers; [] if `key` is missing. Raises UnsupportedLayer."""
        value = self.get(key, [])
        if not isinstance(value, list) or any(not isinstance(kind, str) for kind in value):
            raise UserError(
                f"{self.source}: {key} must list a type for each layer, got "
                f"{abbreviate_repr(value)}."
            )
        if value and len(value) < count:
            raise UserError(
                f"{self.source}: {key} must list {count} layers, as many as there are, got "
                f"{len(value)}."
            )
        for index, kind in enumerate(value[:count]):
            if kind not in supported:
                raise UnsupportedLayer(
                    f"{self.source}: layer {index} is {abbreviate_repr(kind)}, which is not "
                    f"supported; {key} may have {', '.join(supported)}."
                )
        return value[:count]

    def section(self, key: str) -> Mapping[str, Any]:
        """A mapping; empty if `key` is missing."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise UserError(
                f"{self.source}: {key} must map names to values, got {abbreviate_repr(value)}."
            )
        return value

    def is_null(self, key: str) -> bool:
        """Whether `key` is null, which switches it off; a missing key means the default."""
        return key in self._values and self._values[key] is None

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value


_PLAIN = ("attention", "full_attention", "sliding_attention", "chunked_attention")
_MARKS = {  # key of a config → what its layers have
    "index_topk": "sparse attention with an indexer",
    "hidden_size_per_layer_input": "per-layer embeddings",
    "kv_lora_rank": "multi-head latent attention",
    "linear_num_value_heads": "a gated delta net",
    "hybrid_override_pattern": "a Mamba layer by its pattern",
    "mamba_d_state": "a Mamba layer",
    "ssm_state_size": "a Mamba layer",
}


def _unknown_layer(values: Mapping[str, Any]) -> str:
    """The first layer that is no plain attention, and its type; empty if the config names none."""
    kinds = values.get("layer_types") or values.get("layers_block_type")
    if isinstance(kinds, list):
        for index, kind in enumerate(kinds):
            if kind not in _PLAIN:
                return f"layer {index} is {abbreviate_repr(kind)}"
    return next(
        (f"layer 0 has {what} ({key})" for key, what in _MARKS.items() if values.get(key)), ""
    )


@cache
def families() -> dict[str, Callable[[Config], Architecture]]:
    """model_type → function that builds the shapes."""
    modules = Registry[Mapping[str, Callable[[Config], Architecture]]]("family")
    found: dict[str, Callable[[Config], Architecture]] = {}
    for builders in modules.usable():
        found |= builders
    return found


def architecture(values: Mapping[str, Any], source: str) -> Architecture:
    """The shapes of a config. Raises UserError, with the known families for an unknown one."""
    # a vision-language model: only its language model
    if isinstance(values.get("text_config"), Mapping):
        text_config = values["text_config"]
        # whether the head is the embedding may be said for the model as a whole
        above = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
        named = {"model_type": f"{values.get('model_type')}_text", **above, **text_config}
        text = architecture(named, source)
        return replace(
            text, notes=(*text.notes, "text model only: the image encoder is not counted")
        )
    family = values.get("model_type")
    markers = {
        "activation_function": "gelu",
        "dropout": 0.0,
        "layerdrop": 0.0,
        "bos_token_id": None,
    }
    if family == "opt" and all(
        key in values and values[key] == value for key, value in markers.items()
    ):
        # this project wrote the config: OPT with GELU, without dropout and BOS token
        family = "minigpt"
    if not isinstance(family, str) or family not in families():
        layer = _unknown_layer(values)
        raise UnsupportedLayer(
            f"{source}: the architecture {abbreviate_repr(family)} is not "
            f"known{f': {layer}' if layer else ''}. Known: {', '.join(sorted(families()))}."
        )
    built = replace(families()[family](Config(values, source)), family=family, source=source)
    if built.hidden * built.vocabulary * len(built.blocks) > 2**62:
        raise UserError(
            f"{source}: the shapes overflow: {built.total:,} parameters are more than any memory "
            "holds."
        )
    return built
