"""Combine adapters: linear, cat, svd, TIES, DARE, KnOTS.

Each adapter becomes one low-rank update per module, the form that servers accept. TIES: Yadav et
al. 2023, DARE: Yu et al. 2024, KnOTS: Stoica et al. 2025.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.attach import short_targets
from pipeline.adapters.config import CONFIG, PREFIX, WEIGHTS, AdapterSpec, config_of, refuse_experts
from pipeline.adapters.experts import expert_layers
from pipeline.adapters.lora import LoRAEmbedding, LoRALinear, fan_in_fan_out
from pipeline.adapters.low_rank import LowRank, svd, tensors_of, truncated
from pipeline.adapters.peft import Reading
from pipeline.errors import UserError
from pipeline.files.artifact import write_json
from pipeline.files.base_model import tensor_locations
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.device import device_for_matrix
from pipeline.models.load import skeleton
from pipeline.models.save import save_tensors
from pipeline.weights.blocks import find_location, read_rows, tied_names
from pipeline.weights.edits import AddLowRank, AddToExperts, RescaleRows, SetRows
from pipeline.weights.merge_plan import attach_to_meta_model, merge_edits

Updates = dict[str, LowRank]  # by full module name; of stacked experts by the parameter's
Method = Literal["linear", "cat", "svd", "ties", "dare", "dare-ties", "knots"]


class Part(NamedTuple):
    """One adapter's update of a module, and its weight in the combination."""

    update: LowRank
    weight: float


@dataclass(frozen=True)
class CombineOptions:
    """How adapters are combined."""

    method: Method = "cat"
    rank: int = 8  # of the result of svd, ties and dare
    density: float = 0.5  # the share of values that ties, dare and knots keep
    seed: int = 0  # of the values that dare drops


class Combined(NamedTuple):
    """The updates by module, and their relative error over all modules.

    ‖result − exact sum‖ / ‖exact sum‖ in Frobenius norms.
    """

    updates: Mapping[str, LowRank]
    error: float


def combine(
    adapters: Sequence[Mapping[str, LowRank]], weights: Sequence[float], options: CombineOptions
) -> Combined:
    """Σ wᵢ·sᵢ·BᵢAᵢ of each module, by the method of `options`.

    Raises UserError if the adapters do not suit it.
    """
    torch.manual_seed(options.seed)  # DARE drops values at random
    updates, error, norm = {}, 0.0, 0.0
    for name in dict.fromkeys(chain.from_iterable(adapters)):
        parts = [
            Part(adapter[name], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter
        ]
        exact = concatenate(parts)
        if not exact.b.isfinite().all():
            raise UserError(
                f"--weights must keep the sum of each module within fp32, got {list(weights)}: "
                f"that of {name} overflows. Use smaller weights."
            )
        updates[name] = _METHODS[options.method](parts, options, name)
        error += concatenate([Part(updates[name], 1.0), Part(exact, -1.0)]).squared_norm()
        norm += exact.squared_norm()
    return Combined(updates, math.sqrt(max(error, 0.0) / norm) if norm else 0.0)


def concatenate(parts: Sequence[Part]) -> LowRank:
    """The exact sum, of rank ΣR."""
    a = torch.cat([update.a.float() for update, _ in parts])  # (ΣR, I)
    # (O, ΣR)
    b = torch.cat([weight * update.scale * update.b.float() for update, weight in parts], dim=1)
    return LowRank(a, b, 1.0, parts[0].update.embedding)


def _linear(parts: Sequence[Part], _options: CombineOptions, name: str) -> LowRank:
    """PEFT's linear: sums the As and the Bs separately, which adds cross terms.

    Exact only for a single adapter.
    """
    ranks = {update.rank for update, _ in parts}
    if len(ranks) > 1:
        raise UserError(
            f"linear needs adapters of equal rank, got {sorted(ranks)} for {name}. Use --method "
            "cat or svd."
        )
    a = b = torch.zeros(())
    for update, weight in parts:
        share = weight * update.scale
        root = math.sqrt(abs(share))
        a = a + math.copysign(root, share) * update.a.float()
        b = b + root * update.b.float()
    return LowRank(a, b, 1.0, parts[0].update.embedding)


def _truncate(parts: Sequence[Part], options: CombineOptions, _name: str) -> LowRank:
    """The best approximation of rank `options.rank` (Eckart and Young 1936), from the factors."""
    exact = concatenate(parts)
    return truncated(*svd(exact), options.rank, exact.embedding)


def _dense(
    merge: Callable[[Tensor, Tensor, float], Tensor],
    parts: Sequence[Part],
    options: CombineOptions,
    _name: str,
) -> LowRank:
    """Methods that need each adapter's dense update; the SVD truncates the result."""
    deltas = torch.stack([update.delta() for update, _ in parts])  # (adapters, O, I)
    weights = torch.tensor([weight for _, weight in parts]).view(-1, 1, 1)
    # on the CPU: DARE's seed means the same on every device
    merged = merge(deltas, weights, options.density)
    device = device_for_matrix(merged.numel())
    factors = torch.linalg.svd(merged.to(device), full_matrices=False)
    left, values, right = (factor.cpu() for factor in factors)
    return truncated(left, values, right, options.rank, parts[0].update.embedding)


def _knots(parts: Sequence[Part], options: CombineOptions, _name: str) -> LowRank:
    """TIES in a basis that the adapters share: U of [ΔW₁ … ΔWₙ] = UΣ[V₁ … Vₙ]ᵀ (O, nI).

    The result has rank ΣR and is not truncated. TIES merges the ΣVᵢᵀ = UᵀΔWᵢ, as in the authors'
    code. With the QR decomposition [s₁B₁ … sₙBₙ] = Q[S₁ … Sₙ], U is Q times the left singular
    vectors of [S₁A₁ … SₙAₙ]. With Aᵢᵀ = PᵢTᵢ these are those of the small [S₁T₁ᵀ … SₙTₙᵀ].
    """
    scaled = torch.cat([update.scale * update.b.double() for update, _ in parts], dim=1)  # (O, ΣR)
    q, s = torch.linalg.qr(scaled)
    shares = s.split([update.rank for update, _ in parts], dim=1)  # (min(O, ΣR), Rᵢ) each
    inputs = [update.a.double() for update, _ in parts]
    small = torch.cat(
        [share @ torch.linalg.qr(a.T).R.T for share, a in zip(shares, inputs, strict=True)], dim=1
    )
    left = torch.linalg.svd(small, full_matrices=False).U  # (min(O, ΣR), k)
    # (adapters, k, I)
    aligned = torch.stack([left.T @ share @ a for share, a in zip(shares, inputs, strict=True)])
    # rounding leaves a zero slightly off, and it would vote
    aligned[aligned.abs() < 1e-12 * aligned.abs().max()] = 0
    weights = torch.tensor([weight for _, weight in parts]).view(-1, 1, 1)
    merged = _ties(aligned, weights, options.density)
    return LowRank(merged.float(), (q @ left).float(), 1.0, parts[0].update.embedding)


def _ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Keep each adapter's largest values, elect a sign per entry, average the values that agree."""
    return _average_elected_sign(
        torch.stack([_keep_largest(delta, density) for delta in deltas]), weights
    )


def _dare(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Drop values at random and rescale the rest, which keeps the expected sum."""
    return (weights * _drop_and_rescale(deltas, density)).sum(dim=0)


def _dare_ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    return _average_elected_sign(_drop_and_rescale(deltas, density), weights)


def _keep_largest(delta: Tensor, density: float) -> Tensor:
    flat = delta.flatten()
    indices = flat.abs().topk(int(density * len(flat))).indices
    return torch.zeros_like(flat).index_copy(0, indices, flat[indices]).view_as(delta)


def _drop_and_rescale(deltas: Tensor, density: float) -> Tensor:
    mask = torch.stack([torch.bernoulli(torch.full_like(delta, density)) for delta in deltas])
    return deltas * mask / density


def _average_elected_sign(deltas: Tensor, weights: Tensor) -> Tensor:
    # a sum of 0 counts as positive, as in PEFT
    sign = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == sign
    return (weights * deltas * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


_METHODS: Mapping[Method, Callable[[Sequence[Part], CombineOptions, str], LowRank]] = {
    "linear": _linear,
    "cat": lambda parts, _options, _name: concatenate(parts),
    "svd": _truncate,
    "ties": partial(_dense, _ties),
    "dare": partial(_dense, _dare),
    "dare-ties": partial(_dense, _dare_ties),
    "knots": _knots,
}


def low_rank_updates(
    base: Path,
    adapter: Path,
    trust_remote_code: bool = False,
    dora: bool = False,
    reading: Reading | None = None,
    experts: bool = False,
) -> Updates:
    """All changes of the adapter as low-rank updates, in the order of the model's modules.

    n trained token rows are exactly an update of rank n: one factor selects the rows, the other
    holds their difference from the base. `dora`: also DoRA's, with its magnitudes; `experts`: also
    those of stacked experts. Raises UserError for changes that are not low-rank, and for an adapter
    that does not fit the base.
    """
    model, stored = skeleton(base, trust_remote_code), tensor_locations(base)
    spec = attach_to_meta_model(model, base, stored, adapter, reading)
    if not experts:
        refuse_experts(adapter, spec)
    updates: Updates = {}
    for parameter, edit in merge_edits(model, spec).items():
        name = parameter.removesuffix(".weight")
        if isinstance(edit, AddLowRank) or (dora and isinstance(edit, RescaleRows)):
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear | LoRAEmbedding)
            b, a = edit.left, edit.right
            if fan_in_fan_out(layer.base):
                b, a = a.T, b.T
            magnitude = edit.magnitude if isinstance(edit, RescaleRows) else None
            updates[name] = LowRank(a, b, edit.scale, isinstance(layer, LoRAEmbedding), magnitude)
        elif isinstance(edit, AddToExperts):
            continue  # below
        elif isinstance(edit, SetRows):
            location = find_location(parameter, stored, tied_names(model))
            if location is None:
                raise UserError(
                    f"{base} has no tensor {parameter}. Save the model again with transformers' "
                    "save_pretrained."
                )
            # (n, D)
            difference = edit.values.float() - read_rows(location, edit.ids.tolist()).float()
            selection = torch.zeros(len(edit.ids), location.info.shape[0])  # (n, V)
            selection[torch.arange(len(edit.ids)), edit.ids] = 1
            if name == model.embedding_name:
                updates[name] = LowRank(selection, difference.T, 1.0, embedding=True)
            else:
                updates[name] = LowRank(difference, selection.T, 1.0)
        elif isinstance(edit, RescaleRows):
            raise UserError(
                f"{adapter}: {name} was trained with DoRA, which rescales whole rows: the update "
                "is not low-rank. Merge the adapter instead: lora merge --adapter, or lora export "
                "--format merged or gguf."
            )
        else:
            raise UserError(
                f"{adapter}: {name} was trained in full (modules_to_save): the update is not "
                "low-rank. Merge the adapter instead, or train again with "
                "finetune_lora.train_embeddings set to new_rows or none and without "
                "modules_to_save."
            )
    ordered = {name: updates[name] for name, _ in model.named_modules() if name in updates}
    for name, layer in expert_layers(model):
        for projection, update in layer.by_parameter().items():
            ordered[f"{name}.{projection}"] = LowRank(*update.pairs(), update.scale)
    return ordered


def write_updates(
    folder: Path,
    updates: Updates,
    model: CausalLM,
    base_name: str,
    saved: Mapping[str, Tensor] | None = None,
) -> AdapterSpec:
    """Write adapter_config.json and adapter_model.safetensors; returns the adapter's settings."""
    config, tensors, spec = peft_format(updates, model, base_name, saved)
    save_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
    return spec


def peft_format(
    updates: Mapping[str, LowRank],
    model: CausalLM,
    base_name: str,
    saved: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], AdapterSpec]:
    """PEFT's config and tensors of an adapter, and its settings.

    `saved`: parameters of modules that are saved in full (modules_to_save), by full name.
    """
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in saved or {}})
    spec = replace(_adapter_spec(updates, model), saved=tuple(modules))
    transposed = any(is_conv1d(model.get_submodule(name)) for name in updates)
    tensors = dict[str, Tensor]()
    for name, update in updates.items():
        tensors |= tensors_of(name, update)
    tensors |= {PREFIX + name: t for name, t in (saved or {}).items()}
    return config_of(spec, base_name, transposed), tensors, spec


def _adapter_spec(updates: Mapping[str, LowRank], model: CausalLM) -> AdapterSpec:
    linears = [name for name in updates if name != model.embedding_name]
    targets = [*short_targets(model, linears)] if linears else []
    if model.embedding_name in updates:
        targets.append(model.embedding_and_head[0])
    return AdapterSpec(
        **ranks_and_alphas(updates),
        targets=tuple(sorted(targets)),
        dora=any(update.magnitude is not None for update in updates.values()),
    )


def ranks_and_alphas(updates: Mapping[str, LowRank]) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for the modules that differ."""
    pairs = {re.escape(name): (update.rank, update.scale) for name, update in updates.items()}
    common, _ = Counter(pairs.values()).most_common(1)[0]
    others = {pattern: pair for pattern, pair in pairs.items() if pair != common}
    return {
        "rank": common[0],
        "alpha": math.prod(common),
        "ranks": {pattern: rank for pattern, (rank, _) in others.items()},
        "alphas": {pattern: math.prod(pair) for pattern, pair in others.items()},
    }
