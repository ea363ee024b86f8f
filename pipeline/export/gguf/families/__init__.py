"""The families that llama.cpp computes as transformers does, one file each, found by its name.

A setting of a config that a family neither writes nor lists in `fixed` is rejected: llama.cpp would
ignore it, and silently answer differently.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.extensions import Registry

_ROPE_DEFAULTS = {  # what llama.cpp computes with
    "partial_rotary_factor": 1.0,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}
Config = Mapping[str, Any]  # config.json with transformers' defaults


class Layout(NamedTuple):
    """How a GGUF file stores a vector (O,), a matrix (O, I) or a stack of experts (E, O, I).

    Transposed, then rows and columns reordered, then a number added.
    """

    transposed: bool = False
    # row n of the file is row order[n] of the parameter, which may have more
    order: Tensor | None = None
    columns: Tensor | None = None  # the same of columns
    shift: float = 0.0
    values: Callable[[Tensor], Tensor] | None = None  # of a vector's values

    @property
    def is_moved(self) -> bool:
        """Whether rows of the file are not rows of the parameter."""
        return self.transposed or self.order is not None

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a parameter of this shape."""
        return tuple(self.stored(torch.empty(shape, device="meta")).shape)

    def of(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Blocks of rows of the parameter, or of experts → the same blocks of the file."""
        for block in blocks:
            if self.is_moved and block.ndim < 3:
                # embeddings are never moved, so this is at most an MLP's matrix
                block = torch.cat([block, *blocks])
            yield self.stored(block)

    def stored(self, parameter: Tensor) -> Tensor:
        """What lies in the file of a parameter, or of rows of one that is not moved."""
        parameter = self.inputs(self.rows(parameter.mT if self.transposed else parameter))
        if self.values is not None:
            parameter = self.values(parameter)
        return parameter + self.shift if self.shift else parameter

    def rows(self, matrix: Tensor) -> Tensor:
        """Rows (…, O, I) in the file's order."""
        if self.order is None:
            return matrix
        return matrix.index_select(max(0, matrix.ndim - 2), self.order.to(matrix.device))

    def inputs(self, matrix: Tensor) -> Tensor:
        """Columns (…, I) in the file's order."""
        return matrix if self.columns is None else matrix[..., self.columns]

    def restore(self, stored: Tensor, parameter: Tensor) -> None:
        """Write `stored`, which lies in the file, to its place in the `parameter` (…, O, I)."""
        if self.columns is not None:
            stored = stored[..., self.columns.argsort()]
        rows = slice(None) if self.order is None else self.order
        (parameter.mT if self.transposed else parameter)[..., rows, :] = stored - self.shift


class Family(NamedTuple):
    """How llama.cpp stores and configures the models of a family."""

    model_types: Mapping[str, str]  # of config.json → llama.cpp's name of the architecture
    settings: Callable[[Config], dict[str, Any]]  # metadata, without the architecture's prefix
    fixed: Mapping[str, tuple[Any, ...]]  # key of the config → values that llama.cpp assumes
    layout: Callable[[Config, str], Layout] = lambda _config, _name: Layout()  # by full name
    extra: Callable[[Config], Mapping[str, Tensor]] = lambda _config: {}  # tensors by name
    own_head: bool = True  # whether llama.cpp reads a head that is not the embedding
    without_lora: tuple[str, ...] = ()  # endings of what llama.cpp does not add an update to
    # A parameter that is another tensor or several there → the names of parameters that would be
    # these, and their layouts. Empty for all others, which have a `layout`.
    split: Callable[[Config, str], Mapping[str, Layout]] = lambda _config, _name: {}

    def architecture(self, config: Config) -> str:
        """llama.cpp's name of it."""
        return self.model_types[config["model_type"]]

    def layouts(self, config: Config, name: str) -> Mapping[str, Layout]:
        """The parameters that the one of this name is in llama.cpp, and their layouts."""
        return self.split(config, name) or {name: self.layout(config, name)}


def family_of(config: Config) -> Family:
    """The family of a model. Raises UserError if llama.cpp does not compute it."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(
            f"GGUF export does not support model_type {model_type}. Supported: "
            f"{', '.join(sorted(FAMILIES))}. Use --format merged."
        )
    family = FAMILIES[model_type]
    for key, values in family.fixed.items():
        if config.get(key, values[0]) not in values:
            raise unsupported(key, config[key])
    return family


def unsupported(key: str, value: object) -> UserError:
    """The error for a setting that llama.cpp would ignore."""
    return UserError(
        f"config.json: llama.cpp does not compute {key}={value!r} for this model. Use --format "
        "merged."
    )


def head_size(config: Config) -> int:
    """Values per attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def attention(config: Config) -> dict[str, Any]:
    """The settings of all families with rotary positions, by Llama's names in the config."""
    heads = config["num_attention_heads"]
    size = head_size(config)
    norm, key = "layer_norm_rms_epsilon", "rms_norm_eps"
    if key not in config:
        norm, key = "layer_norm_epsilon", "layer_norm_eps"
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        # a mixture may have no dense block
        "feed_forward_length": config.get("intermediate_size") or config["moe_intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": size,
        "attention.value_length": size,
        f"attention.{norm}": float(config[key]),
        "rope.dimension_count": size,
        "vocab_size": config["vocab_size"],
    }


def mixture(config: Config) -> dict[str, Any]:
    """The settings of a mixture of experts; none of another model."""
    settings = {
        "expert_count": config.get("num_local_experts") or config.get("num_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }
    return {key: value for key, value in settings.items() if value}


def gate_and_up(config: Config, name: str, transposed: bool = False) -> dict[str, Layout]:
    """A mixture's stacks (E, O, I), or (E, I, O): in llama.cpp gate and up are tensors apart."""
    module, _, projection = name.rpartition(".")
    if not module.endswith(".experts"):
        return {}
    if projection != "gate_up_proj":
        return {f"{name}.weight": Layout(transposed)}
    size = config.get("moe_intermediate_size") or config["intermediate_size"]
    parts = zip(("gate_proj", "up_proj"), torch.arange(2 * size).chunk(2), strict=True)
    return {f"{module}.{part}.weight": Layout(transposed, rows) for part, rows in parts}


def within_window(config: Config) -> dict[str, Any]:
    """The context up to which llama.cpp's full attention equals the model's sliding windows."""
    window = config.get("sliding_window")
    layers = config.get("layer_types") or ["sliding_attention"]
    if window is None or "sliding_attention" not in layers:
        return {}
    return {"context_length": min(window, config["max_position_embeddings"])}


def rope(parameters: Config, kinds: Iterable[str]) -> dict[str, Any]:
    """Base and scaling of rotary positions. Raises UserError for a scaling not in `kinds`."""
    kind = parameters.get("rope_type", "default")
    if kind not in kinds:
        raise unsupported("rope_type", kind)
    for key, value in _ROPE_DEFAULTS.items():
        if parameters.get(key) not in (value, None):
            raise unsupported(f"rope_parameters.{key}", parameters[key])
    settings: dict[str, Any] = {"rope.freq_base": float(parameters["rope_theta"])}
    if kind in ("linear", "yarn"):
        settings |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        context = parameters["original_max_position_embeddings"]
        settings["rope.scaling.original_context_length"] = context
    return settings


def rotary(config: Config, kinds: Iterable[str]) -> dict[str, Any]:
    """The settings of families like Llama: rotary positions of one kind, windows as contexts."""
    positions = rope(config["rope_parameters"], kinds)
    return {**attention(config), **within_window(config), **positions}


def partly_rotary(config: Config, kinds: Iterable[str]) -> dict[str, Any]:
    """`rotary`, for heads of which positions may rotate only the first values."""
    parameters = dict(config["rope_parameters"])
    rotated = int(head_size(config) * (parameters.pop("partial_rotary_factor", None) or 1.0))
    settings = rotary({**config, "rope_parameters": parameters}, kinds)
    return {**settings, "rope.dimension_count": rotated}


def refuse_narrow_heads(config: Config) -> None:
    """Raises UserError unless the heads together are as wide as the model."""
    size = head_size(config)
    if size * config["num_attention_heads"] != config["hidden_size"]:
        raise unsupported("head_dim", size)


def window_period(config: Config) -> int:
    """n if every nth block has full attention. Raises UserError for other patterns."""
    full = [layer == "full_attention" for layer in config["layer_types"]]
    period = full.index(True) + 1 if True in full else len(full) + 1
    if full != [(number + 1) % period == 0 for number in range(len(full))]:
        raise unsupported("layer_types", config["layer_types"])
    return period


FAMILIES: dict[str, Family] = {}
for _family in Registry[Family]("gguf_family").usable():
    FAMILIES |= dict.fromkeys(_family.model_types, _family)
