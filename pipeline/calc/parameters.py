"""Exact parameter counts of a method, linear by linear, and the document's simplified count."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.settings import FinetuningMethod
from pipeline.calc.target_modules import GROUPS, select_linears
from pipeline.errors import UserError
from pipeline.files.patterns import end_match, one_budget


@dataclass(frozen=True)
class Projection:
    """`count` equal linears that get LoRA: A (rank, inputs) and B (outputs, rank), one pair per expert."""

    name: str
    inputs: int
    outputs: int
    rank: int
    experts: int
    count: int
    parameters_each: int

    @property
    def parameters(self) -> int:
        return self.count * self.parameters_each


@lru_cache(maxsize=32)
@one_budget()
def ranks(model: Architecture, method: FinetuningMethod) -> Mapping[str, int]:
    """Full name → rank of every linear that gets LoRA. Raises UserError for a target that matches nothing."""
    if method.kind != "lora":
        return {}
    targets = _translate_expert_targets(model, method.targets)
    if any(re.search(r"\.\d+\.", f".{want}.") for want in targets):  # names a certain block
        names = select_linears((name for name, _ in model.linears()), targets)
    else:  # the same in every block, so match each name only once
        matches = set(select_linears(dict.fromkeys(linear.name for _, linear in model.linears()), targets))
        names = [name for name, linear in model.linears() if linear.name in matches]
    return {name: _rank_of(name, model, method) for name in names}


def _translate_expert_targets(model: Architecture, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Targets by the current names of the experts, whose gate and up are one tensor (PEFT maps old names the same way).

    Raises UserError if only one of gate and up is a target.
    """
    if not model.style.split_experts:
        return targets
    translated = tuple(_FUSED_NAMES.get(want, want) for want in targets)
    for pair in (("gate_proj", "up_proj"), ("w1", "w3")):
        if len(set(pair) & set(targets)) == 1:
            raise UserError(f"targets: {' and '.join(pair)} are one tensor in this model's experts; name both.")
    return (
        (*translated, "experts.gate_up_proj", "experts.down_proj", "mlp.gate")
        if "all-linear" in targets
        else translated
    )


_FUSED_NAMES = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | {
    "w2": "down_proj",
    "gate": "mlp.gate",
}


def _rank_of(name: str, model: Architecture, method: FinetuningMethod) -> int:
    """Rank by the first matching pattern, `(.*\\.)?(pattern)$` as in PEFT. A fused gate and up get one rank each."""
    for key, rank in method.rank_pattern:
        if end_match(key, name, "rank_pattern"):
            return rank
    fused = model.style.split_experts and name.endswith("experts.gate_up_proj")
    return 2 * method.rank if fused else method.rank


@lru_cache(maxsize=32)
def projections(model: Architecture, method: FinetuningMethod) -> tuple[Projection, ...]:
    """The linears that get LoRA, equal ones grouped, in the model's order."""
    rank_by_name, kinds = ranks(model, method), Counter[tuple[Linear, int]]()
    for name, linear in model.linears():
        if name in rank_by_name:
            kinds[linear, rank_by_name[name]] += 1
    return tuple(
        Projection(
            linear.name.rsplit(".", 1)[-1] if "c_proj" not in linear.name else linear.name,
            linear.inputs,
            linear.outputs,
            rank,
            linear.experts,
            count,
            lora_parameters(linear, rank, method),
        )
        for (linear, rank), count in kinds.items()
    )


def lora_parameters(linear: Linear, rank: int, method: FinetuningMethod) -> int:
    """Parameters of A and B, and DoRA's magnitude, one per output (Liu et al. 2024)."""
    return linear.lora(rank) + (linear.outputs * linear.experts if method.dora else 0)


def magnitudes(model: Architecture, method: FinetuningMethod) -> int:
    """Number of DoRA's magnitudes in the model."""
    return sum(p.count * p.outputs * p.experts for p in projections(model, method)) if method.dora else 0


def trained_parts(model: Architecture, method: FinetuningMethod) -> dict[str, int]:
    """Trainable parameters by part, without zero entries. Raises UserError if the model lacks a target or block."""
    return {name: count for name, count in _count_trained_parts(model, method).items() if count}


def _count_trained_parts(model: Architecture, method: FinetuningMethod) -> dict[str, int]:
    if method.kind == "full":
        return {"all": model.total}
    if method.kind == "prefix":
        width = 2 * len(model.blocks) * model.kv_heads * model.head_size
        return {"prefix": method.virtual_tokens * width}
    if method.kind == "prompt":
        return {"prompt": method.virtual_tokens * model.embedding_width}
    if method.kind == "freeze":
        return _count_unfrozen_parts(model, method)
    matrices = sum(projection.parameters for projection in projections(model, method))
    if method.embeddings == "new_rows":
        ends = 1 if model.tied else 2
        return {"matrices": matrices, "new rows": method.new_rows * model.embedding_width * ends}
    if method.embeddings == "all":
        return {"matrices": matrices, "embeddings": model.embedding, "head": model.head - model.head_bias}
    return {"matrices": matrices}


def _count_unfrozen_parts(model: Architecture, method: FinetuningMethod) -> dict[str, int]:
    if method.last_blocks > len(model.blocks):
        raise UserError(
            f"last-blocks must be at most {len(model.blocks)}, the model's blocks, got {method.last_blocks}."
        )
    first = len(model.blocks) - method.last_blocks
    blocks = sum(block.parameters for block in model.blocks[first:])
    ends = method.train_embeddings
    return {"blocks": blocks, "embeddings": ends * model.embedding, "head": ends * model.head}


def trainable(model: Architecture, method: FinetuningMethod) -> int:
    """Number of trainable parameters."""
    return sum(trained_parts(model, method).values())


def document_count(model: Architecture, method: FinetuningMethod) -> int | None:
    """The document's count (§3): every projection d_model × d_model, 2·r·d_model each.

    None if its rule does not apply: it covers plain LoRA on separate attention projections.
    """
    if method.kind != "lora" or method.dora or method.rank_pattern or method.embeddings != "none":
        return None
    adapted = projections(model, method)
    if not all(p.name in GROUPS["attention"][:5] and p.experts == 1 for p in adapted):
        return None
    return sum(p.count * 2 * method.rank * model.hidden for p in adapted)


def why_they_differ(model: Architecture, method: FinetuningMethod) -> str:
    """Why the exact count differs from the document's, in one line; empty if they agree."""
    document = document_count(model, method)
    if document is None or document == trainable(model, method):
        return ""
    wrong = [p for p in projections(model, method) if (p.inputs, p.outputs) != (model.hidden, model.hidden)]
    shapes = ", ".join(f"{p.name} {p.inputs:,} → {p.outputs:,}" for p in wrong)
    return f"the document takes every projection as {model.hidden:,} × {model.hidden:,}; here {shapes}"


def notes(model: Architecture, method: FinetuningMethod) -> list[str]:
    """Remarks for the reader of these counts."""
    adapted = projections(model, method) if method.kind == "lora" else ()
    texts = []
    wide = [p for p in adapted if p.rank > min(p.inputs, p.outputs)]
    if wide:
        p = min(wide, key=lambda p: min(p.inputs, p.outputs))
        texts.append(f"rank {p.rank} is more than {p.name} can use: its rank is at most {min(p.inputs, p.outputs)}")
    with_experts = any(p.experts > 1 for p in adapted)
    if with_experts and model.style.split_experts:
        texts.append("experts' gate and up are one tensor: it gets a rank for each, twice the rank, as in PEFT")
    elif with_experts:
        texts.append("experts are one tensor a layer: PEFT adapts them by target_parameters, not target_modules")
    elif "all-linear" in method.targets and any(linear.experts > 1 for linear in model.blocks[-1].linears):
        texts.append("all-linear leaves these experts out, as PEFT does; feed_forward adapts them")
    return texts
