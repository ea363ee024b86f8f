"""Adapters of other tools, read into PEFT's format, for `lora adapters import`.

A tool is one file here with its `FORMAT`, found and not listed; they are asked in their order.
Reading this module imports no torch. Whatever a file says, the result is checked against the base
as any adapter is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import UserError
from pipeline.extensions import Registry
from pipeline.files.text import abbreviate_repr

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.adapters.low_rank import LowRank
    from pipeline.models.base import CausalLM

MOST = 10**9  # of a rank or alpha: fp32 holds their quotient


class Converted(NamedTuple):
    """An adapter in PEFT's format, and the files that it was read from."""

    config: dict[str, Any]  # adapter_config.json
    tensors: Mapping[str, "Tensor"]
    files: tuple[Path, ...]


class Format(NamedTuple):
    """`about`: its line in `lora adapters import --help`.

    `read(folder, model, base)`: the adapter for `model`, the skeleton of the checkpoint `base`;
    None if its files can stay as they are. Raises UserError.
    """

    order: int
    name: str
    about: str
    detect: Callable[[Path], bool]
    read: Callable[[Path, "CausalLM", Path], Converted | None]


def rank_and_alpha(
    path: Path, settings: Mapping[str, Any], rank_key: str, alpha_key: str
) -> tuple[int, float]:
    """The rank and alpha of a tool's settings, read from `path`. Raises UserError."""
    rank: Any = settings.get(rank_key)
    alpha: Any = settings.get(alpha_key)
    are_numbers = isinstance(rank, int) and isinstance(alpha, int | float)
    if are_numbers and 1 <= rank <= MOST and alpha <= MOST:
        return rank, alpha
    raise UserError(
        f"{path} must have {rank_key} and {alpha_key}, got {abbreviate_repr(rank)} and "
        f"{abbreviate_repr(alpha)}."
    )


def detect(folder: Path) -> Format:
    """The format of the adapter in `folder`. Raises UserError if there is none."""
    from pipeline.adapters.config import read_config
    from pipeline.files.artifact import refuse_untrusted

    if folder.is_file():
        raise UserError(
            f"{folder} is a file. Name the folder that it lies in, with the config beside it."
        )
    refuse_untrusted(folder)
    for tool in FORMATS.values():
        if tool.detect(folder):
            return tool
    read_config(folder)  # says what else it is, if it is a model or holds adapters
    names = ", ".join(tool.name for tool in FORMATS.values())
    raise UserError(f"{folder} is no adapter. Those of {names} are read.")


def base_of(folder: Path) -> Path:
    """The base that a PEFT adapter names.

    Raises UserError for one of another tool, which needs --base.
    """
    from pipeline.adapters import folder as adapter_folder

    if (name := detect(folder).name) != "PEFT":
        raise UserError(
            f"{folder} is an adapter of {name}. Pass the base it was trained on with --base."
        )
    return adapter_folder.base_of(folder)


def low_rank(
    model: "CausalLM",
    name: str,
    a: "Tensor",
    b: "Tensor",
    scale: object,
    source: Path,
    magnitude: "Tensor | None" = None,
) -> "LowRank":
    """s·BA of the layer `name`, with A (R, I) and B (O, R).

    Raises UserError if they are none of this model.
    """
    from torch import nn

    from pipeline.adapters.attach import adaptable
    from pipeline.adapters.low_rank import LowRank
    from pipeline.files.text import abbreviate_repr

    layer = dict(model.named_modules()).get(name)
    if layer is None or not (adaptable(layer) or name == model.embedding_name):
        raise UserError(
            f"{source}: the base has no layer {name[:200]}. Pass the base it was trained on with "
            "--base."
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(
            f"{source}: A and B of {name} have shapes {shapes}, which have no rank in common. "
            "Copy it again."
        )
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < 1e9:
        raise UserError(
            f"{source}: the scale of the update must be a positive number, got "
            f"{abbreviate_repr(scale)}."
        )
    return LowRank(a, b, float(scale), isinstance(layer, nn.Embedding), magnitude)


def converted(
    updates: Mapping[str, "LowRank"], model: "CausalLM", base_name: object, files: tuple[Path, ...]
) -> Converted:
    """The updates as PEFT has them. Raises UserError if there are none."""
    from pipeline.weights.combine import peft_format

    if not updates:
        raise UserError(f"{files[0]} holds no LoRA. Save the adapter again.")
    ordered = {name: updates[name] for name, _ in model.named_modules() if name in updates}
    config, tensors, _ = peft_format(
        ordered, model, base_name if isinstance(base_name, str) else ""
    )
    return Converted(config, tensors, files)


FORMATS = Registry[Format]("adapter_format", order=lambda form: form.order)
