"""Put an adapter on a model, name its tensors as PEFT does, and take it off by merging."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.adapters import lora
from pipeline.adapters.lora import LoRALinear
from pipeline.adapters.rows import EmbeddingRows, HeadRows
from pipeline.adapters.targets import resolve
from pipeline.errors import UserError
from pipeline.models.causal import CausalLM

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter changes: `targets` get LoRA, `saved` modules train in full, `rows` train row by row."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)


def attach(model: CausalLM, spec: AdapterSpec, dtype: torch.dtype | None = None) -> None:
    """Freeze `model` and give it the adapter's trainable parts, in place: A and B in `dtype`, or each in its linear's.

    Raises UserError on a bad target.
    """
    names = resolve(model, spec.targets)
    embedding, head = model.ends
    trained = {*spec.saved, *spec.rows}
    if model.shape.tied and embedding in trained:
        trained.add(head)
    taken = {name for name in names for other in trained if _is(name, other)}
    if taken:
        raise UserError(
            f"target_modules: {min(taken)} is trained in full or row by row already (train_embeddings). "
            "Leave it out of target_modules, or set train_embeddings to none."
        )
    model.requires_grad_(False)
    add_lora(model, names, spec.rank, spec.alpha, dtype)
    for name in spec.saved:
        model.get_submodule(_full_name(model, name)).requires_grad_(True)
    if spec.rows:
        _attach_rows(model, spec.rows)


def add_lora(model: nn.Module, names: Iterable[str], rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
    """Wrap the linears called `names`, in place; A and B in `dtype`, or each in its linear's own."""
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha, dtype))


def _attach_rows(model: CausalLM, rows: dict[str, tuple[int, ...]]) -> None:
    embedding, head = model.embeddings, model.head
    names = model.ends
    ids = {name: torch.tensor(indices, device=model.device) for name, indices in rows.items()}
    trained = {
        name: nn.Parameter(lora.weight_of(base).detach()[ids[name]].clone())
        for name, base in zip(names, (embedding, head), strict=True)
        if name in rows
    }
    first, last = names
    if model.shape.tied:
        trained[last], ids[last] = trained[first], ids[first]
    if first in trained:
        model.set_submodule(model.embedding_name, EmbeddingRows(embedding, ids[first], trained[first]))
    if last in trained:
        model.set_submodule(model.head_name, HeadRows(head, ids[last], trained[last]))


def tensors(model: CausalLM, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """The adapter's parameters on `model` by PEFT's key.

    As PEFT does, rows of a tied head are written under the embedding alone, a tied pair in full twice.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            found[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
        elif isinstance(module, EmbeddingRows | HeadRows) and name.rsplit(".", 1)[-1] in spec.rows:
            found[f"{PREFIX}{name}{ROWS}"] = module.rows
        elif any(_is(name, saved) for saved in spec.saved):
            found |= {f"{PREFIX}{name}.{own}": p for own, p in module.named_parameters(recurse=False)}  # a bias too
    return found


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base that the adapter stands on, while entered: no second copy of it.

    What is trained in full has no base to go back to here: see `training/retain.py`.
    """
    parts = [m for m in model.modules() if isinstance(m, LoRALinear | EmbeddingRows | HeadRows)]
    for part in parts:
        part.enabled = False
    try:
        yield
    finally:
        for part in parts:
            part.enabled = True


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRA layer with its full name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def merged_model(model: CausalLM) -> CausalLM:
    """A new plain model with the adapter's changes in its weights; `model` is untouched.

    What the adapter leaves alone is shared with `model`. A tied pair stays one matrix, changed once; it is untied only
    where LoRA changed the head alone.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, memo)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoRALinear):
            plain.set_submodule(name, lora.merged(module))
        elif isinstance(module, EmbeddingRows | HeadRows):
            plain.set_submodule(name, _with_rows(module))
    if plain.shape.tied:
        embedding, head = plain.embeddings, plain.head
        if torch.equal(lora.weight_of(embedding), lora.weight_of(head)):
            head.weight = embedding.weight
        else:
            plain.set_rows(plain.shape.rows, tied=False)
    return plain.eval()


def _with_rows(module: EmbeddingRows | HeadRows) -> nn.Module:
    plain = copy.copy(module.base)
    plain._parameters = dict(module.base._parameters)
    weight = lora.weight_of(plain).detach().clone()
    ids = module.ids if isinstance(module, HeadRows) else (module.slot >= 0).nonzero().flatten()
    order = torch.arange(len(ids)) if isinstance(module, HeadRows) else module.slot[ids]
    weight[ids] = module.rows.detach()[order]
    plain.weight = nn.Parameter(weight)
    return plain


def short_targets(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The last names that mean exactly `names`, here and in PEFT, or, where there are none, `names` themselves."""
    last = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    all_called_so = [full for full, _ in model.named_modules() if full.rsplit(".", 1)[-1] in last]
    return last if resolve(model, last) == all_called_so == list(names) else tuple(names)


def _full_name(model: nn.Module, name: str) -> str:
    found: list[str] = [full for full, _ in model.named_modules() if _is(full, name)]
    if len(found) != 1:
        raise UserError(f"the model has {len(found)} modules called {name}; an adapter needs exactly one.")
    return found[0]


def _is(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")
