"""Save and load adapters in PEFT's format: LoRA and DoRA; virtual tokens are in virtual.py.

What does not fit the base is rejected.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import (
    adapter_layers,
    attach,
    read_tensors,
    saves_embedding_or_head,
    targeted,
    tensors,
    untie,
)
from pipeline.adapters.config import (
    CONFIG,
    LAYOUT,
    OTHER_KINDS,
    PREFIX,
    VIRTUAL,
    WEIGHTS,
    AdapterConfig,
    AdapterSpec,
    config_of,
)
from pipeline.adapters.folder import Contents, Fingerprint, refuse_foreign
from pipeline.adapters.lora import (
    EMBEDDING_KEYS,
    LINEAR_KEYS,
    LoRALinear,
    fan_in_fan_out,
    weight_like,
)
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.files.patterns import one_budget
from pipeline.files.safetensors_file import refuse_difference
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.save import save_tensors

COPY = ".base_layer.weight"  # the base's own weight, which PEFT saves with an embedding's LoRA
_A_KEYS = (LINEAR_KEYS[0], EMBEDDING_KEYS[0])


def save_adapter(folder: Path, model: CausalLM, spec: AdapterSpec, base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors into `folder`."""
    layers = dict(adapter_layers(model))
    stored: dict[str, Tensor] = {**tensors(model, spec)}
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):
            keys = [f"{PREFIX}{name}{key}" for key in LINEAR_KEYS]
            # A and B; with PiSSA BA − B₀A₀ as a pair of rank 2R, which fits the plain base
            stored |= zip(keys, layer.pair(), strict=True)
    save_tensors(folder / WEIGHTS, stored)
    conv1d = any(is_conv1d(layer.base) for layer in layers.values())
    artifact.write_json(folder / CONFIG, config_of(stored_spec(model, spec), base_name, conv1d))


def stored_spec(model: CausalLM, spec: AdapterSpec) -> AdapterSpec:
    """The spec of the saved files: PiSSA's BA − B₀A₀ has twice the rank of the trained `spec`."""
    for _, layer in adapter_layers(model):
        if isinstance(layer, LoRALinear) and layer.subtracts_initial:
            return spec.doubled()
    return spec


class Reading(NamedTuple):
    """How an adapter and its base are read from their folders."""

    tensors: Callable[[Path], Mapping[str, Tensor]] = read_tensors
    contents: Contents = artifact.contents
    fingerprint: Fingerprint = base_fingerprint

    @classmethod
    def once(cls) -> "Reading":
        """Keeps what it reads, for an operation that needs the same files several times."""
        return cls(cache(read_tensors), cache(artifact.contents), cache(base_fingerprint))


EACH_TIME = Reading()


class StoredLora(NamedTuple):
    """A LoRA adapter's files, checked against the base."""

    spec: AdapterSpec
    tensors: dict[str, Tensor]  # by PEFT's keys
    path: Path  # of the tensors' file
    # The base's own weights that PEFT saved with LoRA on an embedding, by parameter name: those
    # not compared here, as the model is on the meta device or has no parameter of this name.
    copies: dict[str, Tensor]


def load_lora(
    model: CausalLM, base_folder: Path, config: AdapterConfig, reading: Reading = EACH_TIME
) -> StoredLora:
    """Attach LoRA or DoRA, with the modules and rows that are trained beside it."""
    stored = read_lora(model, base_folder, config, reading)
    # in the dtype of the file's A and B, which may differ from the base's
    dtypes = (value.dtype for key, value in stored.tensors.items() if key.endswith(_A_KEYS))
    attach(model, stored.spec, next(dtypes, None))
    new = {
        id(p): nn.Parameter(value, requires_grad=False) for p, value in stored_values(model, stored)
    }
    # Replaced wherever a tied parameter stands, and not written to: another model may share it.
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = new.get(id(p), p)
    model.requires_grad_(False)
    return stored


def stored_values(model: CausalLM, stored: StoredLora) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of the attached adapter with its stored value, a copy in its dtype.

    Raises UserError unless the file has exactly the tensors that config and model require.
    """
    parameters = tensors(model, stored.spec)
    expected = {key: tuple(p.shape) for key, p in parameters.items()}
    actual = {key: tuple(tensor.shape) for key, tensor in stored.tensors.items()}
    refuse_difference(expected, actual, str(stored.path))
    # a copy, in the dtype of the layer: the tensor read may be a mapped file
    for key, p in parameters.items():
        yield p, stored.tensors[key].to("cpu" if p.is_meta else p.device, p.dtype, copy=True)


@one_budget()
def read_lora(
    model: CausalLM, base_folder: Path, config: AdapterConfig, reading: Reading = EACH_TIME
) -> StoredLora:
    """Read the adapter of `config` and check it against `model`, without attaching it.

    A tied `model` is untied here if the adapter has different weights for embedding and head.
    Raises UserError if the adapter does not fit the base.
    """
    folder = config.path.parent
    path = folder / WEIGHTS
    spec = config.spec(model.embedding_and_head[0])
    spec = replace(spec, rows=_normalized_rows(model, spec, config.path, base_folder))
    names = targeted(model, spec)
    last_row = max(chain.from_iterable(spec.rows.values()), default=0)
    if last_row >= model.shape.rows:
        raise UserError(
            f"{folder}: the adapter trains row {last_row}, but {base_folder} has "
            f"{model.shape.rows} rows. Pass the base it was trained on with --base."
        )
    cannot_tie = saves_embedding_or_head(model, spec) or model.embedding_name in names
    if model.shape.tied and cannot_tie and config.get("ensure_weight_tying"):
        embedding, head = model.embedding_and_head
        raise UserError(
            f"{config.path}: ensure_weight_tying is not supported with LoRA on {embedding}, nor "
            f"with only one of {embedding} and {head} in modules_to_save. Train without it."
        )

    values = dict(reading.tensors(folder))
    base_parameters = dict(model.named_parameters(remove_duplicate=False))
    copies = {}
    for key in [key for key in values if key.endswith(COPY)]:
        name = f"{key.removeprefix(PREFIX).removesuffix(COPY)}.weight"
        value, weight = values.pop(key), base_parameters.get(name)
        if weight is None or (value.shape == weight.shape and weight.is_meta):
            copies[name] = value
        elif value.shape != weight.shape or not torch.equal(weight, value.to(weight)):
            raise other_embedding(path, name)
    if spec.parameters:
        from pipeline.adapters.experts import in_this_layout  # most models have none

        values = in_this_layout(model, spec, values, _layout_of(config), folder)
    _refuse_large_ranks(model, spec, names, values, path)

    # PEFT saves a tied pair twice: it was untied if embedding and head were trained in full to
    # different weights
    pair = [f"{PREFIX}{name}.weight" for name in (model.embedding_name, model.head_name)]
    both = model.shape.tied and all(key in values for key in pair)
    if both and not torch.equal(values[pair[0]], values[pair[1]]):
        untie(model)
    return StoredLora(spec, values, path, copies)


def _layout_of(config: AdapterConfig) -> object:
    """The version of PEFT whose layout of experts' A and B the adapter has; None if unknown."""
    version, folder = config.get("peft_version"), config.path.parent
    # trained or made here, before we wrote a version
    if version is None and (folder / artifact.MANIFEST).exists():
        imported = artifact.read_manifest(folder).get("method") == "import"
        return None if imported else LAYOUT
    return version


def load_adapter(
    model: CausalLM, base_folder: Path, folder: Path, reading: Reading = EACH_TIME
) -> Any:
    """Attach the adapter in `folder` to `model`, or to its skeleton.

    `model` was loaded from `base_folder`.

    Returns what its kind's loader does: the AdapterSpec of LoRA, the VirtualTokens. The model's
    parameters are replaced, never written to, so that a model sharing its tensors is unchanged.
    Raises UserError if the adapter was edited, was trained on another base, has other tensors than
    its config and this model require, or tensors that are not finite; `model` must not be used
    after that.
    """
    refuse_foreign(base_folder, folder, reading.fingerprint, reading.contents)
    config = AdapterConfig.read(folder)
    if config.kind in OTHER_KINDS:
        return import_module(OTHER_KINDS[config.kind]).load(model, base_folder, folder)
    if config.kind in VIRTUAL:
        from pipeline.adapters.virtual import load_virtual  # few adapters are

        return load_virtual(model, config)
    return load_lora(model, base_folder, config, reading).spec  # which rejects any other kind


def other_embedding(path: Path, name: str) -> UserError:
    """The error for an adapter whose copy of the base's embedding differs from the base's."""
    return UserError(
        f"{path} contains its own {name}, which differs from the base model's: it was resized or "
        "trained. Pass the base it was trained on, or save it under modules_to_save."
    )


def _normalized_rows(
    model: CausalLM, spec: AdapterSpec, path: Path, base_folder: Path
) -> dict[str, tuple[int, ...]]:
    """The spec's rows by the last parts of module names; of a tied pair only the embedding's.

    Raises UserError for rows of another module, and for rows that differ in a tied pair: PEFT
    trains them separately but merges both into the same matrix.
    """
    last_parts = dict(
        zip((model.embedding_name, model.head_name), model.embedding_and_head, strict=True)
    )
    rows: dict[str, tuple[int, ...]] = {}
    for name, ids in spec.rows.items():
        last_part = next((last for full, last in last_parts.items() if full.endswith(name)), None)
        if last_part is None:
            allowed = " and ".join(model.embedding_and_head)
            raise UserError(
                f"{path}: trainable_token_indices may name {allowed} only, got "
                f"{', '.join(spec.rows)}."
            )
        rows[last_part] = ids
    embedding, head = model.embedding_and_head
    head_rows = rows.pop(head, None) if model.shape.tied else None
    if head_rows is not None and head_rows != rows.get(embedding):
        raise UserError(
            f"{path}: trainable_token_indices must name {embedding}, or {embedding} and {head} "
            f"with the same rows: they are tied in {base_folder}. Train the adapter that way, or "
            "on a base with an untied head."
        )
    return rows


def _refuse_large_ranks(
    model: CausalLM, spec: AdapterSpec, names: list[str], values: Mapping[str, Tensor], path: Path
) -> None:
    """Raises UserError for a rank above that of every stored A, before memory is allocated."""
    expected = dict[str, tuple[int, ...]]()
    if spec.parameters:
        from pipeline.adapters.experts import stacked_shapes

        expected = stacked_shapes(model, spec)
    for name in names:
        layer = model.get_submodule(name)
        inputs = weight_like(layer).shape[0 if fan_in_fan_out(layer) else 1]
        key = f"{PREFIX}{name}{_A_KEYS[isinstance(layer, nn.Embedding)]}"
        expected[key] = (spec.rank_of(name), inputs)
    shapes = {key: tuple(value.shape) for key, value in values.items() if key.endswith(_A_KEYS)}
    largest = max((shape[0] for shape in shapes.values() if shape), default=0)
    for key, shape in expected.items():
        if shape[0] > largest:
            refuse_difference({key: shape}, {key: shapes[key]} if key in shapes else {}, str(path))
