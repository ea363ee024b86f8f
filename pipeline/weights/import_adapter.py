"""Adapter artifacts that no stage trains: imported from elsewhere, or combined from other adapters."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.adapters.config import CONFIG, OTHER_KINDS, VIRTUAL, WEIGHTS, read_config
from pipeline.adapters.folder import quantization_of, refuse_virtual
from pipeline.adapters.peft import load_adapter
from pipeline.data.tokenizers.chat_template import TEMPLATE
from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.files.base_model import tensor_locations
from pipeline.files.safetensors_file import fingerprint, read_header
from pipeline.models.load import skeleton
from pipeline.project import provenance
from pipeline.weights.combine import CombineOptions, combine, low_rank_updates, write_updates
from pipeline.weights.merge import attach_to_meta_model


def combine_adapters(
    sources: Sequence[Path],
    weights: Sequence[float],
    options: CombineOptions,
    base: Path,
    out: Path,
    trust_remote_code: bool = False,
) -> float:
    """Write the combination of adapters of one base to `out`; returns its relative distance from the exact sum.

    Trained token rows become low-rank updates of embedding and head. Raises UserError.
    """
    for source in sources:
        refuse_virtual(source)
    kinds = {quantization_of(source) for source in sources}
    if len(kinds) > 1:
        raise UserError(
            f"the adapters were trained on different quantizations of the base: {', '.join(sorted(kinds))}. Combine "
            "adapters of one quantization."
        )
    refuse_other(out, "combine", sources)
    updates, error = combine(
        [low_rank_updates(base, source, trust_remote_code) for source in sources], weights, options
    )
    with artifact.writing(out) as folder:
        spec = write_updates(folder, dict(updates), skeleton(base, trust_remote_code), str(base))
        copy_tokenizer(base, folder)
        params = {**asdict(options), "weights": list(weights), "rank": spec.rank, "alpha": spec.alpha}
        manifest = build_manifest(
            "combine", "pipeline.weights.import_adapter", base, params | {"quantization": kinds.pop()}
        )
        inputs = {
            f"{number} {source.resolve().name}": artifact.digest(source)
            for number, source in enumerate(sources, start=1)
        }
        artifact.seal(folder, manifest | {"inputs": inputs, "seed": options.seed, "error": error})
    return error


def import_adapter(source: Path, base: Path, out: Path, trust_remote_code: bool = False) -> bool:
    """Import an adapter from elsewhere as an artifact bound to `base`; returns whether it was verified as its base.

    Its tensors must fit the base, and an embedding that PEFT saved with them must equal the base's. If it names a hub
    model that is in the local cache, that model's weights must equal the base's. Raises UserError.
    """
    refuse_other(out, "import", [source])
    model, config = skeleton(base, trust_remote_code), read_config(source)
    if str(config.get("peft_type")) in {*VIRTUAL, *OTHER_KINDS}:
        load_adapter(model, base, source)
        params: dict[str, Any] = {} if model.virtual is None else {"virtual_tokens": model.virtual.count}
    else:
        spec = attach_to_meta_model(model, base, tensor_locations(base), source)
        params = {"rank": spec.rank, "alpha": config["lora_alpha"]}
    params["quantization"] = quantization_of(source)
    verified = _refuse_other_base(source, base)
    with artifact.writing(out) as folder:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, folder / name)
        artifact.write_json(folder / CONFIG, {**config, "base_model_name_or_path": str(base)})
        copy_tokenizer(base, folder)
        copy_template(source, folder)
        base_name = config.get("base_model_name_or_path")
        origin = {
            "name": source.resolve().name,
            "base": base_model.shared_name(base_name) if isinstance(base_name, str) else base_name,
            "sha256": {name: artifact.file_digest(source / name) for name in (CONFIG, WEIGHTS)},
        }
        manifest = build_manifest("import", "pipeline.weights.import_adapter", base, params)
        artifact.seal(folder, manifest | {"inputs": {}, "seed": None, "source": origin})
    return verified


def refuse_other(out: Path, method: str, sources: Sequence[Path]) -> None:
    """Raises UserError if `out` overlaps with `sources`, or holds something that `method` did not write."""
    made = (out / artifact.MANIFEST).exists() and artifact.read_manifest(out).get("method") == method
    artifact.refuse_other(out, made, sources)


def build_manifest(method: str, module: str, base: Path, params: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an adapter that no stage trained, without its inputs and seed."""
    return {
        "kind": "adapter",
        "method": method,
        "stage": None,
        "params": params,
        "code": provenance.code_digest(module),
        "versions": provenance.versions(),
        "commit": provenance.commit(module),
        "base": base_model.base_fingerprint(base),
    }


def _refuse_other_base(source: Path, base: Path) -> bool:
    """Whether the hub model that the adapter names is in the local cache and has the base's weights.

    Raises UserError if it is there with other weights.
    """
    base_name = read_config(source).get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        return False
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        revision = read_config(source).get("revision")
        snapshot = Path(snapshot_download(base_name, revision=revision, local_files_only=True))
        weights = base_model.weight_files(snapshot)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, UserError, OSError):
        return False  # not a hub id, or not in the local cache
    base_weights = base_model.weight_files(base)
    if _layout(weights) != _layout(base_weights):
        return False  # another precision or other tensor names: values cannot be compared
    if fingerprint(weights) != fingerprint(base_weights):
        raise UserError(
            f"{source} names {base_name} as its base. That model is in the hub's cache, and {base} has other weights. "
            "Name the right base with --base."
        )
    return True


def copy_template(source: Path, folder: Path) -> None:
    """Copy the adapter's chat template, if it has one: it was trained with it."""
    if (source / TEMPLATE).is_file():
        shutil.copyfile(source / TEMPLATE, folder / TEMPLATE)


def _layout(weights: Sequence[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype and shape of each tensor."""
    infos = (item for path in weights for item in read_header(path).items())
    return {name: (info.dtype, info.shape) for name, info in infos}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of `source` into `folder`."""
    for path in sorted(path for pattern in base_model.TOKENIZER for path in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
