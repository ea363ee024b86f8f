"""Adapters as artifacts: taken in from elsewhere, or made of others."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.adapters.folder import CONFIG, VIRTUAL, WEIGHTS, quantization_of, read_config, refuse_virtual
from pipeline.adapters.peft.load import load_adapter
from pipeline.adapters.peft.virtual_tokens import VirtualSpec
from pipeline.data.tokenizers.chat_template import TEMPLATE
from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.files.safetensors_header import fingerprint, read_header
from pipeline.files.shards import places
from pipeline.models.load import skeleton
from pipeline.project import provenance
from pipeline.weights.as_low_rank import updates_of, write_updates
from pipeline.weights.combine import CombineOptions, combine
from pipeline.weights.merge_plan import attach_to_meta_model


def combine_adapters(
    sources: Sequence[Path],
    weights: Sequence[float],
    how: CombineOptions,
    base: Path,
    out: Path,
    trust_remote_code: bool = False,
) -> float:
    """Write the combination of adapters of one base to `out`; returns how far it is from the exact sum.

    Rows that were trained one by one become updates of embedding and head. Raises UserError.
    """
    for source in sources:
        refuse_virtual(source)
    kinds = {quantization_of(source) for source in sources}
    if len(kinds) > 1:
        raise UserError(f"The adapters were trained on bases in different bits: {', '.join(sorted(kinds))}.")
    refuse_other(out, "combine", sources)
    updates, error = combine([updates_of(base, source, trust_remote_code) for source in sources], weights, how)
    with artifact.writing(out) as folder:
        spec = write_updates(folder, dict(updates), skeleton(base, trust_remote_code), str(base))
        copy_tokenizer(base, folder)
        params = {**asdict(how), "weights": list(weights), "rank": spec.rank, "alpha": spec.alpha}
        manifest = manifest_of(
            "combine", "pipeline.weights.import_adapter", base, params | {"quantization": kinds.pop()}
        )
        inputs = {f"{number} {one.resolve().name}": artifact.digest(one) for number, one in enumerate(sources, start=1)}
        artifact.seal(folder, manifest | {"inputs": inputs, "seed": how.seed, "error": error})
    return error


def import_adapter(source: Path, base: Path, out: Path, trust_remote_code: bool = False) -> bool:
    """Take an adapter from elsewhere in as an artifact that is bound to `base`; whether its base is known to be that.

    Its tensors must fit the base, and an embedding that PEFT wrote beside them must be the base's. Where it names a
    model of the hub that lies in the local cache, that model's weights must be the base's. Raises UserError.
    """
    refuse_other(out, "import", [source])
    params = _fitting(source, base, trust_remote_code) | {"quantization": quantization_of(source)}
    known = _refuse_other_base(source, base)
    with artifact.writing(out) as folder:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, folder / name)
        config = read_config(folder)
        artifact.write_json(folder / CONFIG, {**config, "base_model_name_or_path": str(base)})
        copy_tokenizer(base, folder)
        copy_template(source, folder)
        named = config.get("base_model_name_or_path")
        origin = {
            "name": source.resolve().name,
            "base": base_model.shared_name(named) if isinstance(named, str) else named,
            "sha256": {name: artifact.file_digest(source / name) for name in (CONFIG, WEIGHTS)},
        }
        manifest = manifest_of("import", "pipeline.weights.import_adapter", base, params)
        artifact.seal(folder, manifest | {"inputs": {}, "seed": None, "source": origin})
    return known


def _fitting(source: Path, base: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What the manifest is to say of the adapter, which fits its base. Raises UserError."""
    model, config = skeleton(base, trust_remote_code), read_config(source)
    if str(config.get("peft_type")) in VIRTUAL:
        spec = load_adapter(model, base, source)
        assert isinstance(spec, VirtualSpec)
        return {"virtual_tokens": spec.tokens}
    return {"rank": attach_to_meta_model(model, base, places(base), source).rank, "alpha": config["lora_alpha"]}


def refuse_other(out: Path, method: str, sources: Sequence[Path]) -> None:
    """Raises UserError if `out` is read, or holds something that `method` did not make."""
    made = (out / artifact.MANIFEST).exists() and artifact.read_manifest(out).get("method") == method
    artifact.refuse_other(out, made, sources)


def manifest_of(method: str, module: str, base: Path, params: dict[str, Any]) -> dict[str, Any]:
    """What is said of an adapter that no stage made, but its inputs and its seed."""
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
    named = read_config(source).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return False
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        revision = read_config(source).get("revision")
        snapshot = Path(snapshot_download(named, revision=revision, local_files_only=True))
        weights = base_model.weight_files(snapshot)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, UserError, OSError):
        return False  # no name of the hub's, or not here
    own = base_model.weight_files(base)
    if _layout(weights) != _layout(own):
        return False  # the same model in another precision or under other names: its numbers cannot be compared
    if fingerprint(weights) != fingerprint(own):
        raise UserError(
            f"{source} names {named} as its base. That model is in the hub's cache, and {base} has other weights. "
            "Name a base that has them with --base."
        )
    return True


def copy_template(source: Path, folder: Path) -> None:
    """The adapter's own chat template, where it came with one: it was trained on that."""
    if (source / TEMPLATE).is_file():
        shutil.copyfile(source / TEMPLATE, folder / TEMPLATE)


def _layout(weights: Sequence[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor."""
    infos = (item for path in weights for item in read_header(path).items())
    return {name: (info.dtype, info.shape) for name, info in infos}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Its files, beside an adapter's."""
    for path in sorted(path for pattern in base_model.TOKENIZER for path in source.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
