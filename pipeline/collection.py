"""Adapters as artifacts: taken in from elsewhere, or made of others."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import artifact, bases, provenance
from pipeline.adapters.combine import How, combine
from pipeline.adapters.peft_format import load_adapter
from pipeline.adapters.updates import updates_of, write_updates
from pipeline.binding import CONFIG, WEIGHTS, quantization_of, read_config
from pipeline.errors import UserError
from pipeline.models.skeleton import skeleton
from pipeline.tensors import fingerprint


def combine_adapters(
    sources: Sequence[Path], weights: Sequence[float], how: How, base: Path, out: Path, trust_remote_code: bool = False
) -> float:
    """Write the combination of adapters of one base to `out`; returns how far it is from the exact sum.

    Rows that were trained one by one become updates of embedding and head. Raises UserError.
    """
    kinds = {quantization_of(source) for source in sources}
    if len(kinds) > 1:
        raise UserError(f"The adapters were trained on bases in different bits: {', '.join(sorted(kinds))}.")
    updates, error = combine([updates_of(base, source, trust_remote_code) for source in sources], weights, how)
    refuse_others(out)
    with artifact.writing(out) as folder:
        spec = write_updates(folder, dict(updates), skeleton(base, trust_remote_code), str(base))
        copy_tokenizer(base, folder)
        params = {**asdict(how), "weights": list(weights), "rank": spec.rank, "alpha": spec.alpha}
        manifest = _manifest("combine", "pipeline.collection", base, params | {"quantization": kinds.pop()})
        inputs = {str(source): artifact.digest(source) for source in sources}
        artifact.seal(folder, manifest | {"inputs": inputs, "seed": how.seed, "error": error})
    return error


def import_adapter(source: Path, base: Path, out: Path, trust_remote_code: bool = False) -> bool:
    """Take an adapter from elsewhere in as an artifact that is bound to `base`; whether its base is known to be that.

    Its tensors must fit the base. Where it names a model of the hub that lies in the local cache, that model's weights
    must be the base's. Raises UserError.
    """
    refuse_others(out)
    spec = load_adapter(skeleton(base, trust_remote_code), base, source)
    known = _refuse_other_base(source, base)
    with artifact.writing(out) as folder:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, folder / name)
        config = read_config(folder)
        artifact.write_json(folder / CONFIG, {**config, "base_model_name_or_path": str(base)})
        copy_tokenizer(base, folder)
        origin = {
            "path": str(source),
            "base": config.get("base_model_name_or_path"),
            "sha256": {name: artifact.file_digest(source / name) for name in (CONFIG, WEIGHTS)},
        }
        params = {"rank": spec.rank, "alpha": config["lora_alpha"], "quantization": quantization_of(source)}
        manifest = _manifest("import", "pipeline.collection", base, params)
        artifact.seal(folder, manifest | {"inputs": {}, "seed": None, "source": origin})
    return known


def refuse_others(out: Path) -> None:
    """Raises UserError if something is at `out` that is not an adapter."""
    if out.exists() and not (out / CONFIG).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no adapter. Name another folder with --out, or remove it.")


def _manifest(method: str, module: str, base: Path, params: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "method": method,
        "stage": None,
        "params": params,
        "code": provenance.code_digest(module),
        "versions": provenance.versions(),
        "commit": provenance.commit(module),
        "base": bases.base_fingerprint(base),
    }


def _refuse_other_base(source: Path, base: Path) -> bool:
    named = read_config(source).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return False
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        revision = read_config(source).get("revision")
        snapshot = Path(snapshot_download(named, revision=revision, local_files_only=True))
        weights = bases.weight_files(snapshot)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, UserError, OSError):
        return False  # no name of the hub's, or not here
    if fingerprint(weights) != fingerprint(bases.weight_files(base)):
        raise UserError(
            f"{source} names {named} as its base. That model is in the hub's cache, and {base} has other weights. "
            "Name a base that has them with --base."
        )
    return True


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Its files, beside an adapter's."""
    for path in sorted(path for pattern in bases.TOKENIZER for path in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
