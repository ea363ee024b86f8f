"""Put an adapter on a model, name its tensors as PEFT does, and switch it off."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.adapters import lora
from pipeline.adapters.config import AdapterSpec, lies_in, ways_to
from pipeline.adapters.dora import DoRALinear
from pipeline.adapters.lora import LoRAEmbedding, LoRALinear
from pipeline.adapters.target_modules import resolve, targeted
from pipeline.adapters.token_rows import EmbeddingRows, HeadRows
from pipeline.errors import UserError
from pipeline.files.patterns import one_budget
from pipeline.models.base import CausalLM
from pipeline.project.params.sections import Init

PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"
LOW_RANK = LoRALinear | LoRAEmbedding
BY_ROWS = EmbeddingRows | HeadRows


@one_budget()
def attach(model: CausalLM, spec: AdapterSpec, dtype: torch.dtype | None = None, init: Init = "document") -> None:
    """Freeze `model` and give it the adapter's trainable parts, in place: A and B in `dtype`, or each in its layer's.

    Raises UserError on a bad target, and where `init` does not fit a rank.
    """
    names = targeted(model, spec)
    embedding, head = model.embedding_and_head
    by_rows = {*spec.rows}
    if model.shape.tied and (embedding in by_rows or spec.saves(model.embedding_name)):
        by_rows.add(head)
    taken = {name for name in names if lies_in(name, by_rows) or any(spec.saves(part) for part in ways_to(name))}
    if taken:
        raise UserError(
            f"target_modules: {min(taken)} is trained in full or row by row already (train_embeddings). "
            "Leave it out of target_modules, or set train_embeddings to none."
        )
    model.requires_grad_(False)
    add_lora(model, names, spec, dtype, init)
    _train_in_full(model, spec)
    if spec.rows:
        _attach_rows(model, spec.rows)


def add_lora(
    model: nn.Module,
    names: Iterable[str],
    spec: AdapterSpec,
    dtype: torch.dtype | None = None,
    init: Init = "document",
) -> None:
    """Wrap the linears and embeddings called `names`, in place; A and B in `dtype`, or each in its layer's own."""
    for name in names:
        base, rank, scale = model.get_submodule(name), spec.rank_of(name), spec.scale_of(name)
        if isinstance(base, nn.Embedding):
            if spec.dora:
                raise UserError(f"target_modules: DoRA is for linears; {name} is an embedding. Leave it out.")
            model.set_submodule(name, LoRAEmbedding(base, rank, scale, dtype))
        else:
            kind = DoRALinear if spec.dora else LoRALinear
            model.set_submodule(name, kind(base, rank, scale, dtype, init))


def _train_in_full(model: CausalLM, spec: AdapterSpec) -> None:
    """Raises UserError for a name that means no module."""
    if model.shape.tied and saves_one_end(model, spec):
        separate(model)
    modules = list(model.named_modules())
    for name in spec.saved:
        if not any(full.endswith(name) for full, _ in modules):
            raise UserError(f"modules_to_save: the model has no module called {name}.")
    for full, module in modules:
        if spec.saves(full):
            module.requires_grad_(True)


def saves_one_end(model: CausalLM, spec: AdapterSpec) -> bool:
    """Whether one of embedding and head trains in full and the other does not."""
    return spec.saves(model.embedding_name) != spec.saves(model.head_name)


def separate(model: CausalLM) -> None:
    """Give the head of a tied pair a weight of its own: as in PEFT, where one of the two is trained alone."""
    model.head.weight = nn.Parameter(lora.weight_of(model.head).detach().clone(), requires_grad=False)


def _attach_rows(model: CausalLM, rows: Mapping[str, tuple[int, ...]]) -> None:
    embedding, head = model.embeddings, model.head
    names = model.embedding_and_head
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
            if isinstance(module, DoRALinear):
                found[f"{PREFIX}{name}{MAGNITUDE}"] = module.magnitude
        elif isinstance(module, LoRAEmbedding):
            found[f"{PREFIX}{name}.lora_embedding_A"] = module.lora_A
            found[f"{PREFIX}{name}.lora_embedding_B"] = module.lora_B
        elif isinstance(module, BY_ROWS) and name.rsplit(".", 1)[-1] in spec.rows:
            found[f"{PREFIX}{name}{ROWS}"] = module.rows
        elif spec.saves(name):
            found |= {f"{PREFIX}{name}.{own}": p for own, p in module.named_parameters()}  # a bias too
    return found


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base that the adapter stands on, while entered: no second copy of it.

    What is trained in full has no base to go back to here: see `training/retain.py`.
    """
    parts = [m for m in model.modules() if isinstance(m, LOW_RANK | BY_ROWS)]
    for part in parts:
        part.enabled = False
    try:
        yield
    finally:
        for part in parts:
            part.enabled = True


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAEmbedding]]:
    """Every LoRA layer with its full name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LOW_RANK))


def short_targets(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The last names that mean exactly `names`, here and in PEFT, or, where there are none, `names` themselves."""
    last = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    all_called_so = [full for full, _ in model.named_modules() if full.rsplit(".", 1)[-1] in last]
    return last if resolve(model, last) == all_called_so == list(names) else tuple(names)
