"""Adapter artifacts that no stage trains: imported from elsewhere, or made of other adapters."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.config import (
    CONFIG,
    OTHER_KINDS,
    PREFIX,
    VIRTUAL,
    WEIGHTS,
    AdapterConfig,
    config_of,
    read_config,
)
from pipeline.adapters.folder import quantization_of
from pipeline.adapters.lora import ROWS
from pipeline.adapters.low_rank import LowRankUpdate, tensors_of
from pipeline.adapters.peft import COPY, load_adapter
from pipeline.data.tokenizers.chat_template import TEMPLATE
from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.files.base_model import tensor_locations
from pipeline.files.safetensors_file import fingerprint, read_header
from pipeline.models.base import CausalLM
from pipeline.models.load import skeleton
from pipeline.models.save import copy_tokenizer, load_tensors, save_tensors
from pipeline.project import provenance
from pipeline.weights import foreign
from pipeline.weights.combine import (
    CombineOptions,
    combine,
    low_rank_updates,
    ranks_and_alphas,
    write_updates,
)
from pipeline.weights.compare import Interference, interference
from pipeline.weights.merge_plan import attach_to_meta_model

# The end of a hub name of a quantized model: unsloth/Qwen3-8B-unsloth-bnb-4bit,
# mlx-community/Qwen3-8B-4bit, …-AWQ
QUANTIZED = re.compile(
    r"[-_](unsloth[-_])?(bnb[-_])?(\d[-_]?bits?|int\d|awq|gptq|fp8|nf4|mxfp4|q\d)\b.*$",
    re.IGNORECASE,
)


def combine_adapters(
    sources: Sequence[Path],
    weights: Sequence[float],
    options: CombineOptions,
    base: Path,
    out: Path,
    trust_remote_code: bool = False,
    show: Callable[[list[Interference]], object] = list,
) -> float:
    """Write the combination of adapters of one base; returns its distance from the exact sum.

    `show` is called with how much they interfere, before anything is written. Trained token rows
    become low-rank updates of embedding and head. Raises UserError.
    """
    for source in sources:
        AdapterConfig.read(source).refuse_other_kinds()
    kinds = {quantization_of(source) for source in sources}
    if len(kinds) > 1:
        raise UserError(
            "the adapters were trained on different quantizations of the base: "
            f"{', '.join(sorted(kinds))}. Combine adapters of one quantization."
        )
    refuse_other(out, "combine", sources)
    adapters = [low_rank_updates(base, source, trust_remote_code) for source in sources]
    updates, error = combine(adapters, weights, options)
    show(list(interference(adapters, weights)))
    with artifact.writing(out) as folder:
        spec = write_updates(folder, dict(updates), skeleton(base, trust_remote_code), str(base))
        copy_tokenizer(base, folder)
        params = {
            **asdict(options),
            "weights": list(weights),
            "rank": spec.rank,
            "alpha": spec.alpha,
            "quantization": kinds.pop(),
        }
        inputs = {
            f"{number} {source.resolve().name}": artifact.digest(source)
            for number, source in enumerate(sources, start=1)
        }
        facts = {"seed": options.seed, "error": error}
        seal_adapter(folder, "combine", __name__, base, params, inputs, **facts)
    return error


def write_changed(
    source: Path,
    change: LowRankUpdate,
    base: Path,
    out: Path,
    method: str,
    module: str,
    params: Mapping[str, Any],
) -> None:
    """Write the adapter `source` to `out` with the low-rank updates of `change`.

    `module` has computed them. All else stays as it was: DoRA's magnitudes, token rows, modules
    trained in full, other settings.
    """
    spec = replace(change.spec, **ranks_and_alphas(change.low_rank), rslora=False)
    stored = {PREFIX + name: values for name, values in change.whole.items()}
    stored |= {f"{PREFIX}{name}{ROWS}": values for name, (_, values) in change.rows.items()}
    for name, update in change.low_rank.items():
        stored |= tensors_of(name, update)
    with artifact.writing(out) as folder:
        save_tensors(folder / WEIGHTS, stored)
        transposed = bool(read_config(source).get("fan_in_fan_out"))
        artifact.write_json(folder / CONFIG, config_of(spec, str(base), transposed))
        copy_tokenizer(base, folder)
        copy_template(source, folder)
        ranks = {"rank": spec.rank, "alpha": spec.alpha, "quantization": quantization_of(source)}
        inputs = {source.resolve().name: artifact.digest(source)}
        seal_adapter(folder, method, module, base, {**params, **ranks}, inputs)


class Imported(NamedTuple):
    """What is told of an imported adapter."""

    format: str  # the tool that wrote it
    verified: bool  # whether its base was recognized by its weights
    notes: tuple[str, ...] = ()  # what the user should know


def import_adapter(
    source: Path, base: Path, out: Path, trust_remote_code: bool = False
) -> Imported:
    """Import an adapter from elsewhere, of any registered format, as an artifact bound to `base`.

    Its tensors must fit the base, and an embedding that PEFT saved with them must equal the base's.
    If it names a hub model that is in the local cache, that model's weights must equal the base's.
    Raises UserError.
    """
    refuse_other(out, "import", [source])
    tool = foreign.detect(source)
    model = skeleton(base, trust_remote_code)
    converted = tool.read(source, model, base)
    config = read_config(source) if converted is None else converted.config
    verified = _refuse_other_base(source, config, base)
    files = (source / WEIGHTS, source / CONFIG) if converted is None else converted.files
    with artifact.writing(out) as folder:
        if converted is None:
            params = _checked(model, base, source)
            shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
        else:
            save_tensors(folder / WEIGHTS, converted.tensors)
            artifact.write_json(folder / CONFIG, config)
            try:
                params = _checked(model, base, folder)
            except UserError as error:  # it names files in `folder`, which is about to go
                raise UserError(str(error).replace(str(folder), str(source))) from None
        artifact.write_json(folder / CONFIG, {**config, "base_model_name_or_path": str(base)})
        copy_tokenizer(base, folder)
        copy_template(source, folder)
        name = config.get("base_model_name_or_path")
        origin = {
            "name": source.resolve().name,
            "base": base_model.shared_name(name) if isinstance(name, str) else name,
            "sha256": {path.name: artifact.file_digest(path) for path in sorted(files)},
        }
        if tool.name != "PEFT":
            origin["format"] = tool.name
        seal_adapter(folder, "import", __name__, base, params, {}, source=origin)
    tensors = load_tensors(source / WEIGHTS) if converted is None else converted.tensors
    return Imported(tool.name, verified, (*_note_on_base(name, base), *_note_on_zeros(tensors)))


def _checked(model: CausalLM, base: Path, folder: Path) -> dict[str, Any]:
    """The manifest's params of the adapter in `folder`, if it fits `model`. Raises UserError."""
    config = AdapterConfig.read(folder)
    if config.kind in {*VIRTUAL, *OTHER_KINDS}:
        load_adapter(model, base, folder)
        params = dict[str, Any]()
        if model.virtual is not None:
            params["virtual_tokens"] = model.virtual.count
    else:
        spec = attach_to_meta_model(model, base, tensor_locations(base), folder)
        params = {"rank": spec.rank, "alpha": config.get("lora_alpha")}
    return params | {"quantization": quantization_of(folder)}


def _note_on_base(name: object, base: Path) -> Iterator[str]:
    """A note if the adapter names a quantized base: it learned to correct its errors too."""
    if isinstance(name, str) and (match := QUANTIZED.search(name)):
        yield (
            f"It names {name[:200]}, a quantized model. On {base} it answers a little differently "
            "if that is not quantized in the same way. Its unquantized base is likely "
            f"{name[: match.start()][:200]}."
        )


def _note_on_zeros(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A note if A or B of every layer is zero, as before training."""
    layers: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        layer, is_lora, _ = key.partition(".lora_")
        if is_lora:
            layers.setdefault(layer, []).append(tensor)
        elif not key.endswith(COPY):
            return  # other parts are trained too
    is_zero = [not all(map(torch.any, pair)) for pair in layers.values()]
    if is_zero and all(is_zero):
        yield "It changes nothing: A or B of every layer is zero, as before training."


def refuse_other(out: Path, method: str, sources: Sequence[Path]) -> None:
    """Raises UserError if `out` overlaps with `sources`, or is no result of `method`."""
    has_manifest = (out / artifact.MANIFEST).exists()
    made = has_manifest and artifact.read_manifest(out).get("method") == method
    artifact.refuse_other(out, made, sources)


def seal_adapter(
    folder: Path,
    method: str,
    module: str,
    base: Path,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    **facts: Any,
) -> None:
    """Write the manifest of an adapter that no stage trained; `facts` are further entries."""
    manifest = {
        "kind": "adapter",
        "method": method,
        "stage": None,
        "params": params,
        "code": provenance.code_digest(module),
        "versions": provenance.versions(),
        "commit": provenance.commit(module),
        "base": base_model.base_fingerprint(base),
        "inputs": inputs,
        "seed": None,
    }
    artifact.seal(folder, manifest | facts)


def _refuse_other_base(source: Path, config: Mapping[str, Any], base: Path) -> bool:
    """Whether the hub model that the adapter names is cached here, with the base's weights.

    Raises UserError if it is there with other weights.
    """
    base_name = config.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        return False
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        named = config.get("revision")
        revision = named if isinstance(named, str) else None
        snapshot = Path(snapshot_download(base_name, revision=revision, local_files_only=True))
        weights = base_model.weight_files(snapshot)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, UserError, OSError):
        return False  # not a hub id, or not in the local cache
    base_weights = base_model.weight_files(base)
    if _layout(weights) != _layout(base_weights):
        return False  # another precision or other tensor names: values cannot be compared
    if fingerprint(weights) != fingerprint(base_weights):
        raise UserError(
            f"{source} names {base_name} as its base. That model is in the hub's cache, and {base} "
            "has other weights. Name the right base with --base."
        )
    return True


def copy_template(source: Path, folder: Path) -> None:
    """Copy the adapter's chat template, if it has one: it was trained with it."""
    if (source / TEMPLATE).is_file():
        shutil.copyfile(source / TEMPLATE, folder / TEMPLATE)


def _layout(weights: Sequence[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype and shape of each tensor."""
    infos = chain.from_iterable(read_header(path).items() for path in weights)
    return {name: (info.dtype, info.shape) for name, info in infos}
