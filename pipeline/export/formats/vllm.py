"""The adapter as vLLM serves it: only low-rank updates, all of one rank and with a scale of 1.

Trained token rows become low-rank updates of embedding and head. Not every server reads
rank_pattern and alpha_pattern: SGLang and earlier versions of vLLM take `r` and `lora_alpha` for
all modules. So the scale is part of B, and narrower updates get rows of zeros, which cost a server
nothing: it reserves the largest rank for every module.
"""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.export.formats import (
    Export,
    Format,
    adapter_folder,
    note_on_base,
    note_on_quantization,
)
from pipeline.project.runner import Event

if TYPE_CHECKING:
    from pipeline.adapters.low_rank import LowRank

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank accepts


def write(export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Write the updates, and say how to serve them. Raises UserError."""
    from pipeline.adapters.config import read_config
    from pipeline.models.load import skeleton
    from pipeline.weights.combine import low_rank_updates, write_updates

    yield from note_on_quantization(export)
    base = export.find_base()
    with adapter_folder(export._replace(base=base), out) as folder:
        updates = low_rank_updates(base, export.adapter, export.trust_remote_code)
        name = max(updates, key=lambda name: updates[name].rank)
        widest = updates[name].rank
        if widest > RANKS[-1]:
            raise UserError(
                f"{export.adapter}: {name} needs rank {widest}, but vLLM supports at most "
                f"{RANKS[-1]}. Export with --format merged."
            )
        named = read_config(export.adapter).get("base_model_name_or_path") or str(base)
        uniform = {name: padded(update, widest) for name, update in updates.items()}
        write_updates(folder, uniform, skeleton(base, export.trust_remote_code), named)
    yield from note_on_base(export)
    rank = next(rank for rank in RANKS if rank >= widest)
    modules = quote(f"{out.resolve().name}={out}")
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules {modules}"
    return [
        f"{out}  for vLLM. Serve it with:",
        f"vllm serve {quote(export.base_name or str(base))} {options}",
    ]


def padded(update: "LowRank", rank: int) -> "LowRank":
    """The same update at this rank and a scale of 1: zeros below A (R, I) and beside s·B (O, R)."""
    from torch.nn.functional import pad

    more = rank - update.rank
    a, b = pad(update.a, (0, 0, 0, more)), pad(update.scale * update.b.float(), (0, more))
    return replace(update, a=a, b=b, scale=1.0)


OPTIONS = ("base", "base_name", "trust_remote_code")
FORMAT = Format(
    1, "the adapter as vLLM accepts it, low-rank updates only", OPTIONS, write, "adapter"
)
