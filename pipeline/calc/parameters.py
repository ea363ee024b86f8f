"""Exact counts: what a method trains, linear by linear, and the document's simplified count beside it."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.settings import FinetuningMethod
from pipeline.calc.target_modules import GROUPS, chosen
from pipeline.errors import UserError
from pipeline.files.patterns import end_match, one_budget


@dataclass(frozen=True)
class Projection:
    """`count` equal linears that get LoRA: A (rank, inputs), B (outputs, rank), a pair an expert."""

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
    """Full name → rank of every linear that gets LoRA. Raises UserError for a target that means nothing."""
    if method.kind != "lora":
        return {}
    targets = _of_experts(model, method.targets)
    if any(re.search(r"\.\d+\.", f".{want}.") for want in targets):  # a certain block is meant
        names = chosen((name for name, _ in model.linears()), targets)
    else:  # the same in every block: each name is looked at once
        found = set(chosen(dict.fromkeys(linear.name for _, linear in model.linears()), targets))
        names = [name for name, linear in model.linears() if linear.name in found]
    return {name: _rank(name, model, method) for name in names}


def _of_experts(model: Architecture, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Targets by the names that experts have today: gate and up are one tensor (PEFT maps old names likewise).

    Raises UserError where only one of gate and up is meant.
    """
    if not model.style.split_experts:
        return targets
    named = tuple(_TODAY.get(want, want) for want in targets)
    for pair in (("gate_proj", "up_proj"), ("w1", "w3")):
        if len(set(pair) & set(targets)) == 1:
            raise UserError(f"targets: {' and '.join(pair)} are one tensor in this model's experts; name both.")
    return (*named, "experts.gate_up_proj", "experts.down_proj", "mlp.gate") if "all-linear" in targets else named


_TODAY = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | {"w2": "down_proj", "gate": "mlp.gate"}


def _rank(name: str, model: Architecture, method: FinetuningMethod) -> int:
    """The first pattern that matches decides, as in PEFT: `(.*\\.)?(pattern)$`. Gate and up have a rank each."""
    for key, rank in method.rank_pattern:
        if end_match(key, name, "rank_pattern"):
            return rank
    both = model.style.split_experts and name.endswith("experts.gate_up_proj")
    return 2 * method.rank if both else method.rank


@lru_cache(maxsize=32)
def projections(model: Architecture, method: FinetuningMethod) -> tuple[Projection, ...]:
    """Every kind of linear that gets LoRA, in the model's order."""
    of, kinds = ranks(model, method), Counter[tuple[Linear, int]]()
    for name, linear in model.linears():
        if name in of:
            kinds[linear, of[name]] += 1
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
    """A and B, and DoRA's magnitude, one number an output (Liu et al. 2024)."""
    return linear.lora(rank) + (linear.outputs * linear.experts if method.dora else 0)


def magnitudes(model: Architecture, method: FinetuningMethod) -> int:
    """DoRA's, all of them."""
    return sum(p.count * p.outputs * p.experts for p in projections(model, method)) if method.dora else 0


def trained_parts(model: Architecture, method: FinetuningMethod) -> dict[str, int]:
    """Trainable parameters by part; zero entries are left out. Raises UserError for what the model cannot have."""
    return {name: count for name, count in _parts(model, method).items() if count}


def _parts(model: Architecture, method: FinetuningMethod) -> dict[str, int]:
    if method.kind == "full":
        return {"all": model.total}
    if method.kind == "prefix":
        width = 2 * len(model.blocks) * model.kv_heads * model.head_size
        return {"prefix": method.virtual_tokens * width}
    if method.kind == "prompt":
        return {"prompt": method.virtual_tokens * model.embedding_width}
    if method.kind == "freeze":
        return _frozen_parts(model, method)
    matrices = sum(projection.parameters for projection in projections(model, method))
    if method.embeddings == "new_rows":
        ends = 1 if model.tied else 2
        return {"matrices": matrices, "new rows": method.new_rows * model.embedding_width * ends}
    if method.embeddings == "all":
        return {"matrices": matrices, "embeddings": model.embedding, "head": model.head - model.head_bias}
    return {"matrices": matrices}


def _frozen_parts(model: Architecture, method: FinetuningMethod) -> dict[str, int]:
    if method.last_blocks > len(model.blocks):
        raise UserError(
            f"last-blocks must be at most {len(model.blocks)}, the model's blocks, got {method.last_blocks}."
        )
    first = len(model.blocks) - method.last_blocks
    blocks = sum(block.parameters for block in model.blocks[first:])
    ends = method.train_embeddings
    return {"blocks": blocks, "embeddings": ends * model.embedding, "head": ends * model.head}


def trainable(model: Architecture, method: FinetuningMethod) -> int:
    """Parameters that train."""
    return sum(trained_parts(model, method).values())


def document_count(model: Architecture, method: FinetuningMethod) -> int | None:
    """The document's count (§3): every projection d_model × d_model, 2·r·d_model each.

    None where its rule does not apply: another method than plain LoRA on separate attention projections.
    """
    if method.kind != "lora" or method.dora or method.rank_pattern or method.embeddings != "none":
        return None
    found = projections(model, method)
    if not all(p.name in GROUPS["attention"][:5] and p.experts == 1 for p in found):
        return None
    return sum(p.count * 2 * method.rank * model.hidden for p in found)


def why_they_differ(model: Architecture, method: FinetuningMethod) -> str:
    """One line on the exact count and the document's; empty where they agree."""
    document = document_count(model, method)
    if document is None or document == trainable(model, method):
        return ""
    wrong = [p for p in projections(model, method) if (p.inputs, p.outputs) != (model.hidden, model.hidden)]
    shapes = ", ".join(f"{p.name} {p.inputs:,} → {p.outputs:,}" for p in wrong)
    return f"the document takes every projection as {model.hidden:,} × {model.hidden:,}; here {shapes}"


def notes(model: Architecture, method: FinetuningMethod) -> list[str]:
    """What the reader should know of these counts."""
    found = projections(model, method) if method.kind == "lora" else ()
    said = []
    wide = [p for p in found if p.rank > min(p.inputs, p.outputs)]
    if wide:
        p = min(wide, key=lambda p: min(p.inputs, p.outputs))
        said.append(f"rank {p.rank} is more than {p.name} can use: its rank is at most {min(p.inputs, p.outputs)}")
    adapted = any(p.experts > 1 for p in found)
    if adapted and model.style.split_experts:
        said.append("experts' gate and up are one tensor: it gets a rank for each, twice the rank, as in PEFT")
    elif adapted:
        said.append("experts are one tensor a layer: PEFT adapts them by target_parameters, not target_modules")
    elif "all-linear" in method.targets and any(linear.experts > 1 for linear in model.blocks[-1].linears):
        said.append("all-linear leaves these experts out, as PEFT does; feed_forward adapts them")
    return said
