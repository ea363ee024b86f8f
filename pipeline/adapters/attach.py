"""Find the layers to adapt, attach an adapter to them, name its tensors as PEFT does, scale it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.config import PREFIX, WEIGHTS, AdapterSpec, enclosing_names, lies_in
from pipeline.adapters.folder import refuse_pickle
from pipeline.adapters.lora import (
    EMBEDDING_KEYS,
    LINEAR_KEYS,
    MAGNITUDE,
    ROWS,
    AdapterLayer,
    DoRALinear,
    EmbeddingRows,
    HeadRows,
    LoRAEmbedding,
    LoRALinear,
    weight_of,
)
from pipeline.calc.target_modules import ALL_LINEAR, HEAD, matches_suffix, select_linears
from pipeline.errors import UserError
from pipeline.files.patterns import full_match, one_budget
from pipeline.models.base import CausalLM, LowBitLinear, is_linear
from pipeline.models.save import load_tensors
from pipeline.project.params.sections import Init


def resolve(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the linears that `wanted` matches; UserError for a name without match."""
    linears = (name for name, module in model.named_modules() if adaptable(module))
    return select_linears(linears, wanted, getattr(model, "head_name", HEAD))


def targeted(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Full names of the layers that get LoRA in PEFT: linears, and the embedding if it is named.

    Raises UserError if there are none and no experts either, or if a name matches nothing.
    """
    embedding = getattr(model, "embedding_name", "")
    targets = spec.targets
    layers = [
        name for name, module in model.named_modules() if adaptable(module) or name == embedding
    ]
    if isinstance(targets, str) and targets != ALL_LINEAR:
        matches = [name for name in layers if full_match(targets, name, "target_modules")]
    else:
        wanted = (targets,) if isinstance(targets, str) else targets
        # groups such as all-linear leave the embedding out
        if not any(matches_suffix(embedding, want) for want in wanted):
            layers = [name for name in layers if name != embedding]
        matches = select_linears(layers, wanted, getattr(model, "head_name", HEAD))
    names = [name for name in matches if not spec.excludes(name)]
    if not names and not spec.parameters:
        raise UserError(
            f"target_modules: {targets!r} matches no layer that is not excluded. "
            "Check exclude_modules and layers_to_transform."
        )
    return names


def adaptable(module: nn.Module) -> bool:
    """Whether LoRA can wrap it: a linear, quantized or not."""
    return is_linear(module) or isinstance(module, LowBitLinear)


@one_budget()
def attach(
    model: CausalLM, spec: AdapterSpec, dtype: torch.dtype | None = None, init: Init = "document"
) -> None:
    """Freeze `model` and add the adapter's trainable parts, in place.

    A and B are in `dtype`, or each in its layer's.

    Raises UserError for a bad target or module to save, and where `init` does not fit a rank.
    """
    names = targeted(model, spec)
    embedding, head = model.embedding_and_head
    by_rows = {*spec.rows}
    # a tied head is the same matrix: it trains wherever the embedding does
    if model.shape.tied and (embedding in by_rows or spec.saves(model.embedding_name)):
        by_rows.add(head)
    conflicts = [
        name
        for name in names
        if lies_in(name, by_rows) or any(map(spec.saves, enclosing_names(name)))
    ]
    if conflicts:
        raise UserError(
            f"target_modules: {min(conflicts)} already trains in full or row by row "
            "(train_embeddings, modules_to_save). Remove it from target_modules, or from these."
        )
    model.requires_grad_(False)  # first: what is added or saved below requires gradients again
    if spec.parameters:  # before linears: a weight of theirs is refused by its own name
        from pipeline.adapters.experts import add_experts  # most models have none

        add_experts(model, spec, dtype, init)
    add_lora(model, names, spec, dtype, init)
    if model.shape.tied and saves_embedding_or_head(model, spec):
        untie(model)
    modules = dict(model.named_modules())
    for saved in spec.saved:
        if not any(name.endswith(saved) for name in modules):
            raise UserError(
                f"modules_to_save: no module of the model is named {saved}. Use the end of a "
                "module's full name."
            )
    for name, module in modules.items():
        if not spec.saves(name):
            continue
        if any(isinstance(part, LowBitLinear) for part in module.modules()):
            raise UserError(
                f"modules_to_save: {name} is quantized and cannot train in full. Remove it, or set "
                "quantization to none."
            )
        module.requires_grad_(True)
    if spec.rows:
        _attach_rows(model, spec.rows)


def add_lora(
    model: nn.Module,
    names: Iterable[str],
    spec: AdapterSpec,
    dtype: torch.dtype | None = None,
    init: Init = "document",
) -> None:
    """Wrap the linears and embeddings `names` in place; A and B as `attach` says."""
    for name in names:
        base, rank, scale = model.get_submodule(name), spec.rank_of(name), spec.scale_of(name)
        if isinstance(base, nn.Embedding):
            if spec.dora:
                raise UserError(
                    f"target_modules: DoRA is for linears; {name} is an embedding. Remove it."
                )
            model.set_submodule(name, LoRAEmbedding(base, rank, scale, dtype))
        else:
            kind = DoRALinear if spec.dora else LoRALinear
            model.set_submodule(name, kind(base, rank, scale, dtype, init, spec.dropout))


def saves_embedding_or_head(model: CausalLM, spec: AdapterSpec) -> bool:
    """Whether exactly one of embedding and head trains in full."""
    return spec.saves(model.embedding_name) != spec.saves(model.head_name)


def untie(model: CausalLM) -> None:
    """Give a tied head its own copy of the weight, as in PEFT if one of the two trains."""
    model.head.weight = nn.Parameter(weight_of(model.head).detach().clone(), requires_grad=False)


def _attach_rows(model: CausalLM, rows: Mapping[str, tuple[int, ...]]) -> None:
    trained: dict[str, nn.Parameter] = {}
    embedding, _ = model.embedding_and_head
    for kind, name in ((EmbeddingRows, model.embedding_name), (HeadRows, model.head_name)):
        # a tied head shares the embedding's rows
        key = embedding if model.shape.tied else name.rpartition(".")[2]
        if key in rows:
            base = model.get_submodule(name)
            ids = torch.tensor(rows[key], device=model.device)
            if key not in trained:
                trained[key] = nn.Parameter(weight_of(base).detach()[ids].clone())  # (n, D)
            model.set_submodule(name, kind(base, ids, trained[key]))


def tensors(model: CausalLM, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """The adapter's parameters on `model` by PEFT's keys.

    As in PEFT, a tied pair's rows are saved under the embedding only, and a tied pair trained in
    full is saved twice.
    """
    parameters: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        by_key = module.adapter_parameters() if isinstance(module, AdapterLayer) else {}
        if ROWS in by_key and name.rpartition(".")[2] not in spec.rows:
            by_key = {}  # a tied head's rows are saved with the embedding
        if by_key:
            parameters |= {f"{PREFIX}{name}{key}": p for key, p in by_key.items()}
        elif spec.saves(name):
            # a bias too
            parameters |= {f"{PREFIX}{name}.{key}": p for key, p in module.named_parameters()}
    return parameters


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors. Raises UserError if a number is not finite or no floating point."""
    refuse_pickle(folder)
    path = folder / WEIGHTS
    tensors = load_tensors(path)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {key} must hold floating point numbers, got {kind}. Copy it again."
            )
        if not tensor.float().isfinite().all():  # 8 bits have no isfinite
            raise UserError(
                f"{path}: {key} is not finite. Train the adapter again with a lower learning_rate."
            )
    return tensors


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` computes as its base, without a second copy of it.

    Modules that train in full stay as they are: see `training/retention.py`.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAEmbedding]]:
    """Every LoRA layer with its full name."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear | LoRAEmbedding)
    )


def short_targets(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The last parts of `names`, if these match `names` alone, in PEFT too; else `names`."""
    last = tuple(sorted({name.rpartition(".")[2] for name in names}))
    matches = [full for full, _ in model.named_modules() if full.rpartition(".")[2] in last]
    return last if resolve(model, last) == matches == list(names) else tuple(names)


class AdapterScale:
    """Scales an attached adapter: every W′ becomes W + s·(W′ − W); s = 1 gives W′ bit for bit.

    LoRA's update is linear in its scale; DoRA's is not, so it has a separate strength. Weights
    trained in full or row by row are interpolated from `base` for each s: no tensor is written to.
    """

    def __init__(self, model: CausalLM, base: CausalLM, spec: AdapterSpec) -> None:
        from pipeline.adapters.experts import expert_layers

        scaled: list[Any] = [layer for _, layer in adapter_layers(model)]
        for _, experts in expert_layers(model):
            scaled += experts.by_parameter().values()
        self._lora = [(layer, layer.scale) for layer in scaled]
        self._trained = [
            (parameter, _base_values(key, base, spec), parameter.data)
            for key, parameter in tensors(model, spec).items()
            if not key.endswith((*LINEAR_KEYS, *EMBEDDING_KEYS, MAGNITUDE))
        ]

    def set(self, s: float) -> None:
        for layer, scale in self._lora:
            if isinstance(layer, DoRALinear):
                layer.strength = s
            else:
                layer.scale = s * scale
        for parameter, before, after in self._trained:
            # at 1 the trained bits themselves: lerp rounds
            parameter.data = after if s == 1 else torch.lerp(before, after, s)


def _base_values(key: str, base: CausalLM, spec: AdapterSpec) -> Tensor:
    """The base's values of the adapter's tensor `key`: a full weight, or some of its rows."""
    name, rows, _ = key.removeprefix(PREFIX).partition(ROWS)
    if not rows:
        return base.get_parameter(name).data
    return base.get_parameter(f"{name}.weight").data[list(spec.rows[name.rpartition(".")[2]])]
