"""Which adapters lie in a folder, and what their files say of them: nothing is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.dag import STAGES
from pipeline.errors import UserError
from pipeline.metrics import LOSS, final_loss, read_steps


@dataclass(frozen=True)
class Adapter:
    """One adapter folder. `problem` says why it would be refused; None in a field means: not known."""

    path: Path
    method: str
    rank: int | None
    targets: tuple[str, ...]
    base: str | None
    size: int
    final_loss: float | None
    forgetting: float | None
    problem: str | None


def adapters(root: Path) -> list[Adapter]:
    """Every adapter below `root`, by path."""
    return [_described(path.parent, root) for path in sorted(root.rglob("adapter_config.json")) if _visible(path, root)]


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _described(folder: Path, root: Path) -> Adapter:
    config, problem = _config(folder)
    targets, rank, base = (config.get(key) for key in ("target_modules", "r", "base_model_name_or_path"))
    return Adapter(
        path=folder,
        method=str(config.get("peft_type") or "?").lower(),
        rank=rank if isinstance(rank, int) else None,
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (str(targets),),
        base=base if isinstance(base, str) else None,
        size=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        final_loss=final_loss(read_steps(folder / LOSS)),
        forgetting=_forgetting(folder, root),
        problem=problem,
    )


def _config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """adapter_config.json and, if the folder is not what its manifest says, why."""
    config: dict[str, Any] = {}
    try:
        config = artifact.read_json(folder / "adapter_config.json", "Make the adapter again")
        if not (folder / artifact.MANIFEST).exists():
            return config, "no manifest: base not known"
        artifact.verify(folder)
    except UserError as error:
        return config, str(error)
    return config, None


def _forgetting(folder: Path, root: Path) -> float | None:
    """The rise of the old sentences' loss, if the evaluation below `root` measured this very adapter."""
    for manifest, metrics in _evaluations(root):
        try:
            if manifest["inputs"][STAGES["finetune_lora"].path] == artifact.digest(folder):
                return float(metrics["lora"]["forgetting"]["loss_rise"])
        except (KeyError, TypeError, ValueError):  # some other tool's metrics
            continue
    return None


def _evaluations(root: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for path in sorted(root.glob("*/metrics.json")):
        try:
            yield artifact.read_manifest(path.parent), artifact.read_json(path, "Run `lora evaluate`")
        except UserError:
            continue
