"""The adapter as vLLM serves it: only low-rank updates, scaled by alpha/r.

Trained token rows become low-rank updates of embedding and head.
"""

from collections.abc import Generator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.export.formats import Export, Format, adapter_folder, note_on_quantization
from pipeline.project.runner import Event

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's --max-lora-rank accepts


def write(export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Write the updates, and say how to serve them. Raises UserError."""
    from pipeline.adapters.folder import base_of, read_config
    from pipeline.models.load import skeleton
    from pipeline.weights.combine import low_rank_updates, write_updates

    yield from note_on_quantization(export.adapter)
    base = export.base or base_of(export.adapter)
    with adapter_folder(export._replace(base=base), out) as folder:
        updates = low_rank_updates(base, export.adapter, export.trust_remote_code)
        name, widest = max(((name, update.rank) for name, update in updates.items()), key=lambda pair: pair[1])
        if widest > RANKS[-1]:
            raise UserError(
                f"{export.adapter}: {name} needs rank {widest}, but vLLM supports at most {RANKS[-1]}. "
                "Export with --format merged."
            )
        named = read_config(export.adapter).get("base_model_name_or_path") or str(base)
        write_updates(folder, updates, skeleton(base, export.trust_remote_code), named)
    rank = next(rank for rank in RANKS if rank >= widest)
    modules = f"--max-lora-rank {rank} --lora-modules {out.resolve().name}={out}"
    return [
        f"{out}  for vLLM. Serve it with:",
        f"vllm serve {export.base_name or base} --enable-lora {modules}",
    ]


FORMAT = Format(
    1, "the adapter as vLLM accepts it, low-rank updates only", ("base", "base_name", "trust_remote_code"), write
)
